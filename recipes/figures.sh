#!/usr/bin/env bash
# The README's figures, from results/raw and what is missing there (a run that is there is not made
# again): effects.png by the cube, methods.png by the rows of `main`, and the page of docs/view.png.
# Machine: 2 cores. Minutes: 5 hours a seed of the cube, 2 hours `main`, 3 minutes the page.
# Expected: results/README.md, as it stands. Give --out and --runs to begin from nothing elsewhere.
set -euo pipefail
cd "$(dirname "$0")/.."
python ablate.py --rows cube main "$@"
python train_vapo.py --eval_every 1 --steps 12 --out runs/vapo
python -m lab.view runs/vapo
