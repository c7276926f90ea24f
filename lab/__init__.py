"""How do we know? What measures and draws; every file is a script or a part of one.

plot.py      the curves of runs: python -m lab.plot runs/NAME
view.py      an HTML file of what the critic thought of each token: python -m lab.view runs/NAME
report.py    the ablations' tables and figures: python -m lab.report
effects.py   what each of the seven pieces does, of all their combinations, for report.py
plan.py      memory of a run, on paper: python -m lab.plan --model NAME --gpus 64
bench.py     how fast each part is, against what one would use instead
"""
