#!/bin/sh
# Which images and channels made this digit wrong? One command.
#
#   RUN=runs/digits-cnn sh docs/jobs/why-wrong.sh        lists the wrong test answers, most wrong first
#   RUN=runs/digits-cnn sh docs/jobs/why-wrong.sh 291    explains one of them
#
# Exit code 0: explained. 1: the run lacks what the explanation needs. 2: there is no sample of that number.
set -eu
RUN=${RUN:-runs/digits-cnn}

if [ $# -eq 0 ]; then
    prunekit explain "$RUN" errors
else
    prunekit explain "$RUN" sample "$1"
fi
