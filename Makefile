PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test docs test-cuda sweep walls simulate families gallery leaderboard bench clean

demo: $(STAMP)
	$(BIN)/consilience demo

test: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest -m "not slow and not cuda" -n 2 --dist loadfile

# The documentation as a site, in build/site; a broken link or anchor fails.
docs: $(STAMP)
	$(BIN)/pip install --disable-pip-version-check --quiet -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

sweep: $(STAMP)
	$(BIN)/pytest -m slow

# The accelerator's own tests; without one each is skipped by name.
test-cuda: $(STAMP)
	$(BIN)/pytest -m cuda -rs

# What keeps the code readable, counted; enforces nothing.
walls: $(STAMP)
	$(BIN)/python benchmarks/walls.py src/consilience

simulate: $(STAMP)
	$(BIN)/python benchmarks/simulate_lime.py
	$(BIN)/python benchmarks/simulate_statistics.py

# Which layer, grid and methods each family of networks gets; writes docs/families.md.
families: $(STAMP)
	$(BIN)/python benchmarks/families.py

# The pictures and costs of every explainer in the documentation; writes docs/gallery.
gallery: $(STAMP)
	$(BIN)/python benchmarks/gallery.py

# Methods x metrics x networks, over a folder of photographs; writes docs/leaderboard.md and goes on where it was stopped:
# make leaderboard IMAGES=photos LIMIT=24
IMAGES ?= photos
LIMIT ?= 24
leaderboard: $(STAMP)
	$(BIN)/python benchmarks/leaderboard.py $(IMAGES) --limit $(LIMIT)

# Against the libraries in use, in one run; takes about half an hour on two cores.
bench: $(STAMP)
	$(BIN)/pip install --disable-pip-version-check --quiet -e '.[bench]'
	$(BIN)/python benchmarks/bench.py
	$(BIN)/python benchmarks/memory.py

# One environment serves every target; it is made anew only when the project's requirements change.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --quiet -e '.[test]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache consilience-demo
