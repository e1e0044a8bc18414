# Every target sets up what it needs in a virtual environment inside the repository.
# Python 3.11 or newer and make are all a machine has to bring.
#
#   make chat                             talk to the small bundled model
#   make chat MODEL=/path/to/chatglm3-6b  talk to a checkpoint
#   make chat ARGS='--once 你好'          one answer, for scripts
#   make test ARGS='-k stream_chat'       some of the tests
#   make test-grid                        every way of fine-tuning, every compiled GPU kernel, the longest runs
#   make test-programs                    programs of others, such as lm_eval, on all generations
#   make test-engines                     vLLM, llama.cpp, ms-swift and other engines, on all generations
#   make test-engines ARGS='--table=docs/engines.md'    the same, for the page of results
#   make test-browser                     the web page in Chromium, which the machine has to bring
#   make fuzz                             hostile input, EXAMPLES=5000 of each kind
#   make conformance                      Transformers' own tests of models and tokenizers
#   make conformance ARGS="-m '' --table docs/conformance.md"    the same beside its own GLM-4, for the page of results
#   make bench                            every benchmark, small enough for a laptop
#   make bench ARGS='peers --full'        one of them, as the figures in docs/ were made
#   make bench-gpu                        the quantized weights on a GPU, at the size of ChatGLM3-6B
#   make docs-check                       every command of the READMEs and of docs/

PYTHON ?= python3
MODEL ?= examples/tiny-chatglm3
ARGS ?=
# Tests that run at the same time; those of a file in one process, so that what they share is made once.
WORKERS ?= 2
TOGETHER := -n $(WORKERS) --dist loadfile
# Inputs of each kind that `make fuzz` tries.
EXAMPLES ?= 5000

NEWEST := .venv
FLOOR := .venv-floor
PROGRAMS := .venv-programs
ENGINES := .venv-engines
# These want an older Transformers than the rest.
VLLM := .venv-vllm
SWIFT := .venv-swift
CONFORMANCE := .conformance
# The files mlinter has rules for.
MODEL_FILES := $(wildcard configuration_*.py modeling_*.py tokenization_*.py generation_*.py)

.PHONY: setup environments chat test test-grid test-floor test-programs test-engines test-browser fuzz conformance style fix bench bench-gpu docs-check

setup: $(NEWEST)/installed

# All that CI needs, several at a time with `make -j`.
environments: $(NEWEST)/installed $(FLOOR)/installed $(PROGRAMS)/installed $(PROGRAMS)/torchvision/installed \
	$(CONFORMANCE)/unpacked

chat: setup
	@$(NEWEST)/bin/python examples/chat.py $(MODEL) $(ARGS)

test: setup
	$(NEWEST)/bin/python -m pytest $(TOGETHER) -m 'not grid and not programs and not engines and not browser' $(ARGS)

test-grid: setup
	$(NEWEST)/bin/python -m pytest -n $(WORKERS) -m grid $(ARGS)

test-floor: $(FLOOR)/installed
	$(FLOOR)/bin/python -m pytest $(TOGETHER) -m 'floor and not grid' $(ARGS)

test-programs: $(PROGRAMS)/installed $(PROGRAMS)/torchvision/installed
	$(PROGRAMS)/bin/python -m pytest $(TOGETHER) -m programs $(ARGS)

test-engines: $(ENGINES)/installed $(ENGINES)/gptqmodel $(VLLM)/installed $(VLLM)/torchvision/installed \
	$(SWIFT)/installed
	$(ENGINES)/bin/python -m pytest -m engines $(ARGS)

test-browser: $(PROGRAMS)/installed
	$(PROGRAMS)/bin/python -m pytest -m browser tests/test_web_demo.py $(ARGS)

# In the environment that has the server's packages, so that its doors are among them.
fuzz: $(PROGRAMS)/installed
	FUZZ_EXAMPLES=$(EXAMPLES) $(PROGRAMS)/bin/python -m pytest -n $(WORKERS) tests/fuzz $(ARGS)

conformance: setup $(CONFORMANCE)/unpacked
	$(NEWEST)/bin/python -m pytest -n $(WORKERS) -o addopts=--strict-markers -m 'not grid' tests/conformance $(ARGS)

style: setup
	$(NEWEST)/bin/ruff format --check .
	$(NEWEST)/bin/ruff check .
	$(NEWEST)/bin/mlinter --no-progress $(MODEL_FILES)
	$(NEWEST)/bin/mypy
	$(NEWEST)/bin/mypy --python-version 3.14

fix: setup
	$(NEWEST)/bin/ruff check --fix .
	$(NEWEST)/bin/ruff format .

bench: setup
	$(NEWEST)/bin/python benchmarks/run.py $(ARGS)

bench-gpu: setup
	$(NEWEST)/bin/python benchmarks/quantized.py --device cuda --layers 28 --json output/benchmarks/gpu.json $(ARGS)

docs-check: setup
	$(NEWEST)/bin/python scripts/docs_check.py $(ARGS)

$(NEWEST)/installed: requirements/newest.txt requirements/common.txt
$(FLOOR)/installed: requirements/floor.txt requirements/common.txt

%/installed:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	@test -x $*/bin/python || $(PYTHON) -m venv $*
	@# What is imported is compiled then; all of torch would take a minute.
	$*/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -r $<
	@touch $@

# They see the packages of the newest environment, so that torch is not installed once more.
$(PROGRAMS)/installed: requirements/programs.txt requirements/agent.txt requirements/retrieval.txt requirements/serving.txt
$(ENGINES)/installed: requirements/engines.txt requirements/peers.txt
$(VLLM)/installed: requirements/vllm.txt
$(SWIFT)/installed: requirements/swift.txt
# Without what their packages ask for beside torch; the files say why.
$(VLLM)/installed $(SWIFT)/installed: PIP_FLAGS := --no-deps

$(PROGRAMS)/installed $(ENGINES)/installed $(VLLM)/installed $(SWIFT)/installed: $(NEWEST)/installed
	@test -x $(@D)/bin/python || $(NEWEST)/bin/python -m venv $(@D)
	@$(NEWEST)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/newest.pth
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile $(PIP_FLAGS) \
		-r requirements/$(patsubst .venv-%,%,$(@D)).txt
	@touch $@

$(ENGINES)/gptqmodel: requirements/gptqmodel.txt $(ENGINES)/installed
	$(ENGINES)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps -r $<
	@touch $@

$(PROGRAMS)/torchvision/installed $(VLLM)/torchvision/installed: %/torchvision/installed: requirements/torchvision.txt %/installed
	@rm -rf $(@D)
	$*/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --target $(@D) -r $<
	@touch $@

# The source distribution has the files of tests/ that models share, not the folders beside them.
$(CONFORMANCE)/unpacked: requirements/newest.txt | $(NEWEST)/installed
	@rm -rf $(CONFORMANCE) && mkdir -p $(CONFORMANCE)
	$(NEWEST)/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --no-build-isolation \
		--no-binary :all: --dest $(CONFORMANCE) $$(grep ^transformers== requirements/newest.txt)
	@tar -xzf $(CONFORMANCE)/transformers-*.tar.gz -C $(CONFORMANCE) --strip-components=1
	@rm -r $(CONFORMANCE)/src $(CONFORMANCE)/transformers-*.tar.gz
	@mkdir -p $(CONFORMANCE)/tests/fixtures
	@touch $(CONFORMANCE)/tests/__init__.py $(CONFORMANCE)/tests/fixtures/sample_text.txt $@
