#!/bin/sh
# A table for a paper: criteria with error bars and paired tests, at once and after fine-tuning, in LaTeX. One command.
#
#   sh docs/jobs/table-for-a-paper.sh
#   STUDY=mine.yaml OUT=runs/mine TABLE=table.md sh docs/jobs/table-for-a-paper.sh
#
# STUDY names cases, seeds, criteria and sparsities (docs/comparison.md). OUT keeps the figures of every model that was trained and
# pruned, the curves, and a page for a reviewer; stopped, the command goes on there. TABLE ends in .tex, .md or .csv.
set -eu
STUDY=${STUDY:-recipes/five-criteria.yaml}
OUT=${OUT:-runs/five-criteria}
TABLE=${TABLE:-table.tex}

prunekit compare "$STUDY" --out "$OUT" --table "$TABLE"
