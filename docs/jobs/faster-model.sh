#!/bin/sh
# A model that is three times as fast on this machine, verified: three commands.
#
#   sh docs/jobs/faster-model.sh
#   RECIPE=mine.yaml RUN=runs/mine SPEEDUP=2 sh docs/jobs/faster-model.sh
#
# The last line that it prints is the verdict: what stays, what was lost on validation data, and the speed-up that was measured
# beside the dense model, with its interval. Exit code 0: reached. 1: the structure cannot reach it; the message says how far it
# goes, and nothing is written.
set -eu
RECIPE=${RECIPE:-recipes/digits-cnn.yaml}
RUN=${RUN:-runs/faster}
SPEEDUP=${SPEEDUP:-3}

prunekit train "$RECIPE" --out "$RUN"
prunekit score "$RUN" --criterion taylor
prunekit prune "$RUN" --criterion taylor --structure channels --speedup "$SPEEDUP" --finetune 5 --name fast
