"""docs/federation.md says of every key what it is, and its examples can be read as they stand."""

import re
import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel

from meerkat.federation.admission import Binding
from meerkat.federation.coordinator_settings import FederationConfig, read_federation
from meerkat.federation.site_settings import Accepts, SiteConfig

GUIDE = (Path(__file__).parents[1] / "docs" / "federation.md").read_text()


def section(title: str) -> str:
    return GUIDE.split(f"\n## {title}")[1].split("\n## ")[0]


def rows(title: str, header: str) -> dict[str, str]:
    """The rest of a table's rows, by the keys that each begins with."""
    table = section(title).split(f"| {header} |")[1].split("\n\n")[0].splitlines()[2:]
    cells = [line.strip("|").split("|", 1) for line in table]
    return {key: rest for names, rest in cells for key in re.findall(r"`(\w+)`", names)}


@pytest.mark.parametrize(
    ("title", "header", "settings", "apart"),
    [
        ("4. site.toml", "key", SiteConfig, {"accepts"}),
        ("4. site.toml", "key in `[accepts]`", Accepts, set[str]()),
        ("5. federation.toml", "key in `[federation]`", FederationConfig, set[str]()),
        ("5. federation.toml", "key in `[[federation.sites]]`", Binding, set[str]()),
    ],
)
def test_a_table_has_every_key_with_its_default(
    title: str, header: str, settings: type[BaseModel], apart: set[str]
) -> None:
    told = rows(title, header)
    assert told.keys() == settings.model_fields.keys() - apart
    for name, field in settings.model_fields.items():
        if isinstance(field.default, float | int) and not isinstance(field.default, bool):
            numbers = [float(n.replace(",", "")) for n in re.findall(r"[\d][\d.,]*(?:e-?\d+)?", told[name])]
            assert float(field.default) in numbers, name


def test_the_examples_can_be_read(tmp_path: Path) -> None:
    blocks = {t: "\n\n".join(b for b in section(t).split("\n\n") if b.startswith("    ")) for t in ("4.", "5.")}
    site = SiteConfig.model_validate(tomllib.loads(blocks["4."]))
    assert (site.client, site.accepts.task, site.coordinator) == (0, "topics", "coordinator.example.org:9001")
    (tmp_path / "federation.toml").write_text(blocks["5."])
    config, federation = read_federation(tmp_path / "federation.toml")
    assert [binding.client for binding in federation.sites] == [0, 1, 2]
    assert (config.clients, federation.stream) == (3, site.coordinator)


def test_the_example_with_a_model_of_ones_own_can_be_read(tmp_path: Path) -> None:
    blocks = "\n\n".join(b for b in section("With your own model").split("\n\n") if b.startswith("    "))
    coordinator, site = blocks.split("# site.toml")
    (tmp_path / "federation.toml").write_text(coordinator)
    config, federation = read_federation(tmp_path / "federation.toml")
    assert (config.clients, config.rounds, federation.deadline_s) == (3, 80, 600)
    assert config.model.endswith("smollm2-135m")
    of_site = SiteConfig.model_validate({"client": 0, "data": ".", **tomllib.loads(f"# site.toml{site}")})
    assert (of_site.model.endswith("smollm2-135m"), of_site.accepts.task) == (True, config.task)
