# Every target makes what it needs, from nothing. `make help` lists them.

PYTHON ?= python3
WORKERS ?= 2
# Of the 12 ways in which test-portable runs the learning tests.
RUNS ?= 12
# Of test-gpu and bench-gpu: `cpu` tries them without a card. GPU_PYTHON is an interpreter with a CUDA build of torch and
# what the tests import, where .venv has another build.
DEVICE ?= cuda
GPU_PYTHON ?=
# More for pip, for example where to find a CPU build of torch.
PIP_FLAGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
BENCHMARKS := $(sort $(wildcard tests/benchmarks/bench_*.py))
# Threads that wait must not spin, or a second process on the machine slows the first several times over; large pages,
# and keeping what was freed for the next tensor, save most of the time that fresh memory costs.
RUN := OMP_WAIT_POLICY=PASSIVE THP_MEM_ALLOC_ENABLE=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000
# One thread a process: many threads in several processes on few cores slow torch down several times over.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n $(WORKERS)
ONE_CARD := CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES:-0} PYTHONPATH=. OMP_NUM_THREADS=1 \
  TOKENIZERS_PARALLELISM=false $(or $(GPU_PYTHON),$(BIN)/python)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: fuzz help docs demo demo-quick figures test test-slow test-gpu test-peft-contract test-portable test-browser \
  test-quantised test-served engines-table served-demo bench bench-gpu evidence evidence-quick cards distributed lint wheel-test clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' Makefile

demo: $(INSTALLED)  ## the whole job on a real model: prints the table (up to 25 minutes on 2 quiet cores with bf16 units)
	$(BIN)/python examples/demo_inputs.py --output build/demo/inputs --also de
	$(RUN) $(BIN)/peft-moe-delta run examples/demo.yaml

demo-quick: $(INSTALLED)  ## the same with fewer steps and layers (3 minutes)
	$(BIN)/python examples/demo_inputs.py --output build/demo/inputs --also de
	$(RUN) $(BIN)/peft-moe-delta run examples/demo.yaml --quick

figures: $(INSTALLED)  ## the README's picture: nine languages measured on the demo's model
	$(BIN)/python examples/demo_inputs.py --output build/demo/inputs --also en de fr hu tr el ru ja zh
	mkdir -p examples/figures
	$(RUN) $(BIN)/peft-moe-delta measure --config examples/measure.yaml

test: $(INSTALLED)  ## the tests, but for the slow ones
	$(PYTEST) -m "not slow"

test-slow: $(INSTALLED)  ## the slow tests alone
	$(PYTEST) -m slow

test-gpu: $(if $(GPU_PYTHON),,$(INSTALLED))  ## one card against the CPU; skips without one, DEVICE=cpu tries the tests themselves
	DEVICE=$(DEVICE) $(ONE_CARD) -m pytest tests/gpu

bench-gpu: $(if $(GPU_PYTHON),,$(INSTALLED))  ## layer, training step and decoding on one card: build/gpu/bench.json
	$(ONE_CARD) tests/benchmarks/bench_gpu.py --device $(DEVICE) --output build/gpu/bench.json

test-portable: $(INSTALLED)  ## each learning test's margin over 12 instruction sets, threads and seeds; RUNS=1: the oldest
	$(BIN)/python tests/portable.py --runs $(RUNS) --workers $(WORKERS)

fuzz: $(INSTALLED)  ## thousands of bad values over config, recipes, command line and data files; prints how they ended
	cd tests && OMP_NUM_THREADS=1 PYTHONPATH=. ../$(BIN)/python -m fuzz --number $(or $(NUMBER),2000) --seed $(or $(SEED),0)

# Of the PEFT that is installed: pip fetches its sources where a network is there, and nothing of them is kept in git.
test-peft-contract: $(INSTALLED)  ## PEFT's own contract tests over this method; fetches PEFT's sources
	@set -e; version=$$($(BIN)/python -c 'import peft; print(peft.__version__)'); into=build/peft-contract; \
	if ! test -d $$into/peft-$$version; then \
	  $(BIN)/python -m pip download --quiet --disable-pip-version-check $(PIP_FLAGS) --no-deps --no-binary :all: \
	    --dest $$into peft==$$version; \
	  tar -xzf $$into/peft-$$version.tar.gz -C $$into; \
	fi
	$(PYTEST) -m slow -rs tests/tuner/test_peft_contract.py

bench: $(INSTALLED)  ## every tests/benchmarks/bench_*.py, one after another
	@test -n "$(BENCHMARKS)" || { echo "no tests/benchmarks/bench_*.py found" >&2; exit 1; }
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(RUN) $(BIN)/python $$script; done

# Text of languages that the demo does not have comes from the same wheels.
EVIDENCE := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python tests/benchmarks/evidence.py

evidence: $(INSTALLED)  ## the frontier study: goes on where it was stopped, then makes its tables and pictures (hours)
	$(BIN)/python examples/demo_inputs.py --output build/demo/inputs --also en hu el ru de
	$(RUN) $(EVIDENCE) run --workers $(WORKERS)
	$(EVIDENCE) pages

evidence-quick: $(INSTALLED)  ## one seed, one length and few methods of it, into build/evidence (under 15 minutes)
	$(BIN)/python examples/demo_inputs.py --output build/demo/inputs --also en hu el ru de
	$(RUN) $(EVIDENCE) run --quick --results build/evidence/scores --workers $(WORKERS)
	$(EVIDENCE) pages --results build/evidence/scores --page build/evidence/evidence.md

# Beside the environment, as test-quantised. It is built from source, against the installed PyTorch.
distributed: $(INSTALLED)  ## what equals one process under DDP, FSDP and ZeRO: the table of docs/training.md (half an hour)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --no-deps --no-build-isolation \
	  -c constraints.txt --upgrade --target build/deepspeed deepspeed einops hjson msgpack ninja py-cpuinfo
	OMP_NUM_THREADS=1 PYTHONPATH=build/deepspeed $(BIN)/python tests/distributed_table.py --write

cards: $(INSTALLED)  ## the finished model cards and the README's picture again, from the demo's run where there is one
	@for card in model_cards/*/; do \
	  for file in card.json report.json; do \
	    made=build/demo/run/cards/$$(basename $$card)/$$file; if test -f $$made; then cp $$made $$card; fi; \
	  done; \
	  figure=build/demo/run/report/figures/scores.png; \
	  if test -f $$figure && test -f $$card/scores.png; then cp $$figure $$card; fi; \
	done
	$(BIN)/peft-moe-delta card model_cards/*/

test-browser: $(INSTALLED)  ## the report's page in a headless browser; installs Debian's chromium where there is none
	@{ command -v chromium && command -v chromedriver; } >/dev/null || \
	  { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y chromium chromium-driver >/dev/null; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/browser

# Beside the environment: installed in it, both libraries would be imported in every other test.
test-quantised: $(INSTALLED)  ## experts over quantised bases; fetches bitsandbytes and torchao
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --no-deps -c constraints.txt --upgrade \
	  --target build/quantised bitsandbytes torchao
	PYTHONPATH=build/quantised $(PYTEST) tests/tuner/test_quantised.py

# Beside the environment: none of it is needed to use the package. The converter comes out of llama-cpp-python's sources.
test-served: $(INSTALLED)  ## servers asked by OpenAI's client, and GGUF files in llama.cpp; fetches both and llama.cpp's converter
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --no-deps --upgrade \
	  --target build/served openai jiter sentencepiece sniffio xllamacpp
	XDG_CACHE_HOME=$(CURDIR)/build/cache $(BIN)/python -c 'from peft_moe_delta.served.convert import fetched; fetched()'
	XDG_CACHE_HOME=$(CURDIR)/build/cache PYTHONPATH=build/served $(PYTEST) tests/served

# vLLM and MLX each get an environment of their own in build/engines, a few GB together; the others lie beside ours.
engines-table: $(INSTALLED)  ## every export in every engine, live: the table of docs/serving.md (a quarter of an hour)
	XDG_CACHE_HOME=$(CURDIR)/build/cache OMP_NUM_THREADS=1 $(BIN)/python tests/served_table.py --install --write
	$(BIN)/python docs/generate.py

# After `make demo`. Installs as engines-table and test-served do.
served-demo: $(INSTALLED)  ## the demo's model in vLLM, llama.cpp and our own server, beside the dense: the table of docs/serving.md
	cd tests && ../$(BIN)/python -c 'import served_table as t; t.install("vllm"); t.install("llama.cpp")'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --no-deps --upgrade \
	  --target build/served openai jiter sentencepiece sniffio xllamacpp
	XDG_CACHE_HOME=$(CURDIR)/build/cache $(BIN)/python -c 'from peft_moe_delta.served.convert import fetched; fetched()'
	XDG_CACHE_HOME=$(CURDIR)/build/cache PYTHONPATH=build/served $(BIN)/python tests/served_demo.py --write
	$(BIN)/python docs/generate.py

docs: $(INSTALLED)  ## the documentation as a site, build/docs/site, with every link checked
	$(BIN)/python docs/generate.py
	rm -rf build/docs/pages && mkdir -p build/docs/pages/figures
	cp examples/figures/*.png $(wildcard docs/figures/*.svg) build/docs/pages/figures/
	for page in docs/*.md; do sed 's|\.\./examples/figures/|figures/|' $$page > build/docs/pages/$$(basename $$page); done
	$(PYTHON) -m venv --clear build/docs/env
	build/docs/env/bin/python -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	build/docs/env/bin/mkdocs build --quiet --strict --config-file docs/mkdocs.yml

lint: $(INSTALLED)  ## ruff's rules and formatting, and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel-test: $(INSTALLED)  ## build the wheel, install it in an empty environment, import it from elsewhere
	$(BIN)/python tests/check_wheel.py

clean:  ## remove the environment, the caches and everything built
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# From nothing whenever what is installed may have changed, so that no leftover helps a test to pass.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "The versions in constraints.txt need Python 3.11 or newer, $(PYTHON) is older: make PYTHON=python3.11 ..." >&2; \
	  exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e ".[dev,demo,eval,figures,lm-eval,serve,trl]"
	@touch $@
