# make demo   train on drawn flowers for about a minute, then classify one
# make test   lint and test
# make gpu    check training and inference on a GPU of NVIDIA, and WebGPU in Chromium; two minutes
# make soak   kill training 100 times and see that nothing is lost; half an hour
# make lint   check style, change nothing
#
# Nothing is written outside this folder, but what ONNX Runtime and OpenVINO note in the home.

PYTHON ?= python3
VENV = .venv/bin/python
# pip would compile every file to bytecode, half of its time; Python does so for what it imports.
INSTALL = $(VENV) -m pip install --quiet --no-compile
CACHE = .cache

export TMPDIR := $(CURDIR)/$(CACHE)/tmp
export PIP_CACHE_DIR := $(CURDIR)/$(CACHE)/pip
export MPLCONFIGDIR := $(CURDIR)/$(CACHE)/matplotlib
export npm_config_cache := $(CURDIR)/$(CACHE)/npm
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Where this is set, every process would compile torch anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test gpu soak lint clean

# Beside other work torch's spinning threads would make training several times slower.
demo: export OMP_WAIT_POLICY := PASSIVE
demo: .venv/installed
	$(VENV) tools/sample_flowers.py data/sample
	$(VENV) train.py --data-path data/sample --model shufflenet_v2_x0_5 --epochs 20 --lr 0.02 --lrf 0.01
	$(VENV) predict.py data/sample/tulips/tulips_000.jpg

test: lint
	$(VENV) -m pytest -n 2 --dist worksteal --basetemp=$(CACHE)/pytest

gpu: .venv/installed-dev
	$(VENV) -m pytest -m gpu --basetemp=$(CACHE)/pytest

soak: .venv/installed
	$(VENV) tests/soak.py --kills 100

lint: .venv/installed-dev
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .

clean:
	rm -rf .venv $(CACHE) .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/installed: requirements.txt
	mkdir -p $(CACHE)/tmp
	$(PYTHON) -m venv .venv
	$(INSTALL) -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt requirements-deploy.txt .venv/installed
	$(INSTALL) -r requirements-dev.txt
	touch $@
