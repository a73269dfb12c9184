#!/bin/sh
# A table for a paper from one command: criteria with error bars and paired tests, at once and after fine-tuning, in LaTeX.
#
#     sh docs/jobs/table-for-a-paper.sh [STUDY [FOLDER [FILE]]]
#
# STUDY names cases, seeds, criteria and sparsities (docs/comparison.md). FOLDER keeps every trained and pruned model's figures,
# its curves and a page for a reviewer; stopped, it goes on there. FILE ends in .tex, .md or .csv.
set -eu
prunekit compare "${1:-recipes/five-criteria.yaml}" --out "${2:-runs/five-criteria}" --table "${3:-table.tex}"
