"""What a site agrees to: read from its site.toml, and compared with what a run asks for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model

from meerkat.errors import MeerkatError
from meerkat.federation.site_settings import Accepts, Refused, SiteConfig
from meerkat.masks.baselines import random_mask
from meerkat.masks.sparse_mask import SparseMask, fingerprint
from meerkat.run.mask import make_mask
from meerkat.run.setup import open_problem, resolve
from meerkat.settings.config import RunConfig, make_config


def written(folder: Path, text: str) -> Path:
    path = folder / "site.toml"
    path.write_text(text)
    return path


def site(**bounds: Any) -> SiteConfig:
    return SiteConfig(client=0, data="rows", accepts=Accepts(**bounds))


def asked(**settings: Any) -> RunConfig:
    return make_config({"task": "sst2", "eps": 1e-3, **settings})


def test_a_site_toml_of_two_lines_is_enough(tmp_path: Path) -> None:
    config = SiteConfig.load(written(tmp_path, 'client = 3\ndata = "some/hub-name"\n'))
    assert (config.client, config.data, config.model, config.evaluate) == (3, "some/hub-name", "embedded", False)
    assert config.accepts == Accepts()
    assert not config.accepts.embeddings


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere, home = tmp_path / "elsewhere", tmp_path / "site"
    elsewhere.mkdir()
    for name in ("rows", "model"):
        (home / name).mkdir(parents=True)
    (home / "ca.pem").touch()
    text = 'client = 0\ndata = "rows"\nmodel = "./model"\ncertificate_authority = "ca.pem"\n'
    path = written(home, text)
    monkeypatch.chdir(elsewhere)
    config = SiteConfig.load(path)
    assert config.data == str(home / "rows")
    assert config.model == str(home / "model")
    assert config.certificate_authority == str(home / "ca.pem")
    assert SiteConfig.load(Path("../site/site.toml")).data == str(home / "rows")


def test_the_embedded_model_is_no_folder_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "embedded").mkdir()
    assert SiteConfig.load(written(tmp_path, 'client = 0\ndata = "x"\n')).model == "embedded"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('data = "x"', "client: missing"),
        ("client = 0", "data: missing"),
        ('client = -1\ndata = "x"', "client -1: must be at least 0"),
        ('client = "one"\ndata = "x"', "client one: must be a valid integer"),
        ('client = 0\ndata = "x"\nclients = 3', "clients: unknown; must be one of client, data, model"),
        (
            'client = 0\ndata = "x"\n[accepts]\npsi = 1',
            "accepts.psi: unknown; must be one of extensions, task, task_digest, model, mask",
        ),
        ('client = 0\ndata = "x"\n[accepts]\neps_minimum = 0', "accepts.eps_minimum 0: must be greater than 0"),
        ('client = 0\ndata = "x"\n[accepts]\nrounds = 0', "accepts.rounds 0: must be at least 1"),
        (
            'client = 0\ndata = "x"\n[accepts]\nembeddings = "some"',
            "accepts.embeddings some: must be a valid boolean",
        ),
        ('client = 0\ndata = "x"\naccepts = 1', "accepts 1: must be a table"),
        ("client = ", "not valid TOML"),
        ("client = " + "9" * 5000, "not valid TOML .*4300 digits"),
        ("client = " + "[" * 100_000, "not valid TOML .*RecursionError"),
    ],
)
def test_what_is_wrong_in_it_is_one_clear_line(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(MeerkatError, match=said) as told:
        SiteConfig.load(path)
    assert str(path) in str(told.value)
    assert len(str(told.value).splitlines()) == 1


def test_a_name_that_no_file_can_have_is_left_to_whoever_reads_it(tmp_path: Path) -> None:
    name = "x" * 5000
    assert SiteConfig.load(written(tmp_path, f'client = 0\ndata = "{name}"')).data == name


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(MeerkatError, match="No such file"):
        SiteConfig.load(tmp_path / "site.toml")


def test_default_bounds_accept_a_default_run() -> None:
    site().check_settings(resolve(make_config({"eps": 1e-3})), "topics")
    site().check_settings(asked(method="meerkat-vp", local_steps=5), "sst2")


@pytest.mark.parametrize(
    ("bounds", "run", "said"),
    [
        ({"task": "rte"}, {}, "task: the run asks for sst2, the site accepts rte"),
        ({}, {"problem": "shapes"}, "problem: the run asks for shapes, the site accepts classification"),
        ({"eps_minimum": 1e-2}, {}, "eps: the run asks for 0.001, the site accepts at least 0.01"),
        ({"eps_maximum": 1e-4}, {}, "eps: the run asks for 0.001, the site accepts at most 0.0001"),
        ({"batch_minimum": 32}, {}, "batch_size: the run asks for 16, the site accepts at least 32"),
        ({}, {"directions": 101}, "directions: the run asks for 101, the site accepts at most 100"),
        ({"rounds": 10}, {"rounds": 11}, "rounds: the run asks for 11, the site accepts at most 10"),
        ({"local_steps": 4}, {"local_steps": 5}, "local_steps: the run asks for 5, the site accepts at most 4"),
        (
            {"local_steps": 99},
            {"early_stop": "vp"},
            "local_steps: the run asks for 100, the site accepts at most 99",
        ),
        (
            {"local_steps": 99},
            {"method": "meerkat-vp"},  # by its method, not by a setting of its own
            "local_steps: the run asks for 100, the site accepts at most 99",
        ),
    ],
)
def test_a_bound_is_held_and_told(bounds: dict[str, Any], run: dict[str, Any], said: str) -> None:
    with pytest.raises(Refused) as told:
        site(**bounds).check_settings(asked(**run), "sst2")
    assert str(told.value) == f"{said} (its site.toml, [accepts])"


@pytest.mark.parametrize(
    ("bounds", "run"),
    [
        ({"task": "sst2"}, {}),
        ({"eps_minimum": 1e-3, "eps_maximum": 1e-3}, {}),
        ({"batch_minimum": 16}, {}),
        ({"rounds": 10}, {"rounds": 10}),
        ({"directions": 4}, {"directions": 4}),
        ({"local_steps": 5}, {"local_steps": 5}),  # calibration_steps says nothing where nobody is calibrated
        ({"local_steps": 100}, {"early_stop": "vp"}),
    ],
)
def test_a_bound_is_itself_accepted(bounds: dict[str, Any], run: dict[str, Any]) -> None:
    site(**bounds).check_settings(asked(**run), "sst2")


PRIVATE: dict[str, Any] = {"dp": "example", "dp_noise_multiplier": 30.0}


@pytest.mark.parametrize(
    ("bounds", "run", "said"),
    [
        ({}, {"eps": 1e-6}, "eps: the run asks for 1e-06, the site accepts at least 0.0001"),
        ({}, {"dp_clip": 1e-4}, "dp_clip: the run asks for 0.0001, the site accepts at least 0.001"),
        ({}, {"dp_clip": 1e4}, "dp_clip: the run asks for 10000.0, the site accepts at most 1000.0"),
        ({"dp_clip_minimum": 2.0}, {}, "dp_clip: the run asks for 1.0, the site accepts at least 2.0"),
        ({"dp_clip_maximum": 0.5}, {}, "dp_clip: the run asks for 1.0, the site accepts at most 0.5"),
        ({}, {"dp_delta": 1e-4}, "dp_delta: the run asks for 0.0001, the site accepts at most 1e-05"),
        ({"delta": 1e-7}, {}, "dp_delta: the run asks for 1e-05, the site accepts at most 1e-07"),
        ({}, {"dp_epsilon": 190.0}, "dp_epsilon 190: at most 20 can be accounted for; lower it"),
        ({}, {"dp_delta": 1e-300}, "dp_delta 1e-300: at least 1e-12 can be accounted for; raise it"),
        ({}, {"dp_noise_multiplier": 1e9}, "dp_noise_multiplier 1e+09: at most 10,000 can be accounted for; lower it"),
        (
            {},
            {"rounds": 100_000, "local_steps": 1_000},
            "noisy steps 1e+08: at most 1e+06 can be accounted for; lower it",
        ),
    ],
)
def test_what_a_private_run_may_ask_is_bounded_before_a_row_is_read(
    bounds: dict[str, Any], run: dict[str, Any], said: str
) -> None:
    own = site(**bounds).model_copy(update={"ledger": "ledger"})
    with pytest.raises(Refused) as told:
        own.check_settings(asked(**{**PRIVATE, **run}), "sst2")
    assert str(told.value).startswith(said)
    own = site().model_copy(update={"ledger": "ledger"})
    own.check_settings(asked(**PRIVATE), "sst2")


def embedding_mask(model: Any) -> SparseMask:
    name = "model.embed_tokens.weight"
    shapes = {name: tuple(dict(model.named_parameters())[name].shape)}
    total = sum(p.numel() for p in model.parameters())
    return SparseMask({name: torch.arange(200)}, shapes, fingerprint(model), total)


def test_masks_are_held_against_the_bounds() -> None:
    model = tiny_model()
    mask = random_mask(model, 0.01, exclude=("embeddings",))
    count = len(mask)
    assert count > 100
    site().check_mask(mask, model)
    site(model=mask.fingerprint, mask=mask.digest(), mask_minimum=count).check_mask(mask, model)
    for bounds, wanted, accepted in (
        ({"mask_minimum": count + 1}, f"mask_minimum: the run asks for {count}", f"at least {count + 1}"),
        ({"mask": "f" * 64}, f"mask: the run asks for {mask.digest()}", "f" * 64),
        ({"model": "f" * 64}, f"model: the run asks for {mask.fingerprint}", "f" * 64),
    ):
        with pytest.raises(Refused) as told:
            site(**bounds).check_mask(mask, model)
        assert str(told.value) == f"{wanted}, the site accepts {accepted} (its site.toml, [accepts])"


@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
def test_embeddings_move_only_where_the_site_says_so(architecture: str) -> None:
    model = tiny_model(architecture)
    mask = embedding_mask(model)
    with pytest.raises(Refused, match=r"embeddings: .*model\.embed_tokens\.weight.*no embeddings in the mask"):
        site().check_mask(mask, model)
    site(embeddings=True).check_mask(mask, model)


def test_a_mask_with_some_embeddings_among_others_is_refused() -> None:
    model = tiny_model()
    mask = random_mask(model, 0.05)
    assert "model.embed_tokens.weight" in mask.entries
    with pytest.raises(Refused, match="embeddings"):
        site().check_mask(mask, model)


def test_the_embedded_model_s_default_mask_is_accepted() -> None:
    config = resolve(make_config({"text_sequences": 4, "threads": 1, "device": "cpu"}))
    problem = open_problem(config)
    site().check_mask(make_mask(config, problem), problem.model)


def test_a_key_before_without_a_key_is_refused(tmp_path: Path) -> None:
    config = SiteConfig.load(written(tmp_path, 'client = 0\ndata = "x"\nsigning_key_before = "old.key"\n'))
    with pytest.raises(MeerkatError, match="signing_key_before: hands over to signing_key, which is not given"):
        config.signing_keys()
    assert SiteConfig.load(written(tmp_path, 'client = 0\ndata = "x"\n')).signing_keys() == (None, None)
