# Two commands are enough: `make demo` and `make test`. `make help` lists the rest.
#
#   VENV=DIR          the environment (default .venv); one that you made yourself is used as it is
#   PYTHON=python3.x  the Python that creates it (default python3, >= 3.10)
#   DETECTRON2=SPEC   a pip spec of detectron2 instead of the pinned wheel
#   DEMO_OPTS="..."   config options for the demo, e.g. DEMO_OPTS="SOLVER.MAX_ITER 20"
#   TEST_OPTS="..."   further arguments of pytest

VENV ?= .venv
PYTHON ?= python3
DETECTRON2 ?=
DEMO_CONFIG ?= projects/SOLO/configs/nuclei_solov2_R_18_FPN.yaml
DEMO_OUTPUT ?= output/demo
DEMO_OPTS ?=
TEST_OPTS ?=
BENCH_OPTS ?=
TABLE_OPTS ?=

RUN := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help env demo test test-slow lint bench nuclei-table clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' Makefile | expand -t 22

env:  ## make the environment, or bring it up to date
	@$(PYTHON) tools/make_env.py --venv "$(VENV)" --detectron2 "$(DETECTRON2)"

demo: env  ## train on real images, evaluate, draw (about 10 minutes on 2 cores)
	$(RUN) train_net.py --config-file $(DEMO_CONFIG) --overwrite OUTPUT_DIR $(DEMO_OUTPUT) $(DEMO_OPTS)
	$(RUN) -m instseg_ext.cli.main visualize predictions --config-file $(DEMO_OUTPUT)/config.yaml \
		--weights $(DEMO_OUTPUT)/model_final.pth --confidence-threshold 0.3 \
		--output $(DEMO_OUTPUT)/pictures --overwrite
	@echo "Scores are in $(DEMO_OUTPUT)/results.json."
	@echo "Pictures: open $(DEMO_OUTPUT)/pictures/contact_sheet.png"

# Two at a time with one thread each: small models gain little from threads.
test: env  ## run the tests (without the slow ones)
	$(RUN) -m pytest -q -n 2 --dist worksteal $(TEST_OPTS)

test-slow: env  ## run the slow tests (about half an hour on 2 cores)
	$(RUN) -m pytest -q -n 2 --dist worksteal -m slow $(TEST_OPTS)

lint: env  ## check style and formatting
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: env  ## measure the speed of the demo's model
	$(RUN) -m instseg_ext.cli.main benchmark --config-file $(DEMO_CONFIG) $(BENCH_OPTS)

nuclei-table: env  ## train every nuclei config on both folds and print the table (hours)
	$(RUN) tools/nuclei_table.py $(TABLE_OPTS)

clean:  ## remove the demo's output, builds and caches; the environment stays
	rm -rf output/demo build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage .coverage.* htmlcov
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
