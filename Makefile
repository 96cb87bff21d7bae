# What a change goes through; each target is one line of CONTRIBUTING.md.
.PHONY: check lint types test browser wheel picture mutate

check: lint types test            ## everything but the wheel

lint:                             ## style and format
	ruff check . && ruff format --check .

types:                            ## every function of the package is typed
	mypy

test:                             ## the README's test command, without a browser
	pytest --ignore=tests/browser

browser:                          ## the app in a real browser (needs chromium)
	pytest tests/browser

wheel:                            ## build the package, install it in a fresh environment, use it from another folder
	python tests/wheel.py

picture:                          ## docs/images/structure.svg, from the imports
	python docs/structure.py

mutate:                           ## mutation testing of measuring, steering and features (about an hour a core)
	OMP_NUM_THREADS=1 mutmut run
