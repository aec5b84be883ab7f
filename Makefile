# Two commands: `make demo` and `make test`. Both create .venv if needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test docs nano

demo: $(VENV)/installed
	$(BIN)/flash-vstream demo

# nano, the demo's clips, the mini benchmark's pictures and a judge's weights are fetched first, as part of
# installing: the tests need no network. A browser and an RTSP server are installed where that is possible
# (.ci/packages).
test: $(VENV)/installed-dev docs
	bash .ci/packages
	$(BIN)/flash-vstream pull nano
	$(BIN)/python -m flash_vstream.sample_clips
	$(BIN)/python -m flash_vstream.evaluate.mini
	$(BIN)/python -m flash_vstream.evaluate.similarity
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# The site, in build/site. A broken link, or a name that the API reference no longer finds, is an error.
docs: $(VENV)/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# nano's training from start to end, in hours; the same command resumes a run that was stopped.
# DATA: a folder with captions.json, splits.json, annotations.jsonl and pictures. OUTPUT: where everything is written.
DATA ?=
OUTPUT ?= nano-training
nano: $(VENV)/installed-dev
	@test -n "$(DATA)" || { echo "usage: make nano DATA=folder [OUTPUT=folder]" >&2; exit 2; }
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/train_nano.sh "$(DATA)" "$(OUTPUT)"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/installed
