# Each target first sets up what it needs in .venv: a fresh clone needs git, Python 3.11+ and make.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := flower,gguf,hub,lora,privacy,quantize,tensorboard,dev

FUZZ_SECONDS ?= 600

# where it is set, each of the hundred processes that tests start compiles all sources anew
unexport PYTHONDONTWRITEBYTECODE

# three on two cores, since many wait; a file's tests stay together, for what they share; the longest file comes first
SIDE_BY_SIDE := -n 3 --dist loadfile --no-loadscope-reorder

.PHONY: demo federation llm bench evidence check test test-all test-lowest lock fuzz clean

demo: .venv/ready
	$(BIN)/python examples/demo.py

# Its folder must be new or empty: make federation OUT=runs/another
federation: OUT ?= runs/federation
federation: .venv/ready
	$(BIN)/python examples/federation/run --out $(OUT)

# Rows and text come from the Hugging Face hub, or from here: make llm DATA=FOLDER TEXT=FILE.jsonl
llm: .venv/ready
	$(BIN)/python scripts/get_model.py smollm2-135m
	$(BIN)/python examples/llm.py $(if $(DATA),--data '$(DATA)') $(if $(TEXT),--text '$(TEXT)')

# On a model of your own: make bench MODEL=DIR TASK=sst2 DATA=DIR [GGUF=FILE] [DTYPE=bfloat16]
bench: .venv/ready
	$(BIN)/python benchmarks/all.py $(foreach name,MODEL TASK DATA GGUF DTYPE,$(if $($(name)),--$(shell echo $(name) | tr A-Z a-z) $($(name))))

# docs/evidence.md, from the runs in docs/evidence
evidence: .venv/ready
	$(BIN)/python scripts/evidence.py

# What calls in benchmarks, scripts and examples are not checked for; that they match what they call, they are
LOOSE := assignment call-overload import-not-found import-untyped misc no-any-return operator union-attr

check: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy $(LOOSE:%=--disable-error-code=%) benchmarks scripts examples

test: .venv/ready
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

test-all: .venv/ready
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "slow or not slow"

# The lowest versions that pyproject.toml allows, except torch's: in .venv-lowest, made anew each time.
# uv chooses the versions and pip installs them, as it does in .venv.
test-lowest: .venv/ready
	$(PYTHON) -m venv --clear .venv-lowest
	grep '^torch==' constraints.txt > .venv-lowest/torch.txt
	$(BIN)/uv pip compile --quiet --python .venv-lowest/bin/python --resolution lowest-direct --all-extras --no-annotate -c .venv-lowest/torch.txt -o .venv-lowest/lowest.txt pyproject.toml
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-lowest/lowest.txt -e '.[$(EXTRAS)]'
	.venv-lowest/bin/python -m pytest $(SIDE_BY_SIDE)

# requirements.lock: what a deployed federation installs, each file by its SHA-256, as the package index lists them.
# setuptools builds the package itself.
lock: .venv/ready
	echo 'setuptools>=77' | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra flower --extra privacy --generate-hashes --no-annotate --no-emit-index-url --custom-compile-command 'make lock' -c constraints.txt -o requirements.lock pyproject.toml -

fuzz: .venv/ready
	FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m pytest tests/test_fuzz.py

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else f"Python {v[0]}.{v[1]} is too old: meerkat needs 3.11 or newer; make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf .venv .venv-lowest runs build .pytest_cache .mypy_cache .ruff_cache .hypothesis
