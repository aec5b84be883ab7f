# Two commands: `make demo` and `make test`. Both create .venv if needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test docs train-nano

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
	$(BIN)/python -m pytest --cov=flash_vstream --cov-report=term-missing:skip-covered

# The site, in build/site. A broken link, or a name that the API reference no longer finds, is an error.
docs: $(VENV)/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# nano's training from start to end, hours on a CPU: make train-nano PICTURES=flickr8k/
# A run that was interrupted continues where it was. The last command replaces the shipped adapter.
PICTURES ?= flickr8k/
train-nano: $(VENV)/installed-dev
	$(BIN)/flash-vstream train prepare $(PICTURES) prepared/
	$(BIN)/flash-vstream train stage1 configs/nano-stage1.yaml --data prepared/ --output runs/stage1
	$(BIN)/flash-vstream train stage2 configs/nano-stage2.yaml --data prepared/ --output runs/stage2
	$(BIN)/flash-vstream train grounding configs/nano-grounding.yaml --data prepared/ --output runs/grounding
	$(BIN)/flash-vstream train stage2 configs/nano-stage2-grounded.yaml --data prepared/ --output runs/grounded
	$(BIN)/flash-vstream train stage2 configs/nano-stage2-practice.yaml --data prepared/ --output runs/practice
	$(BIN)/flash-vstream train stage2 configs/nano-stage2-order.yaml --data prepared/ --output runs/order
	$(BIN)/flash-vstream train stage2 configs/nano-stage2-validation.yaml --data prepared/ --output runs/validation
	$(BIN)/flash-vstream train average runs/order/result runs/validation/result runs/averaged/result --share 0.4
	$(BIN)/flash-vstream train export runs/averaged/result src/flash_vstream/models/nano_adapter

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/installed
