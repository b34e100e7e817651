#!/usr/bin/env bash
# Shows what the experiment prints, and goes on showing it until Ctrl-C.
#
#   logs.sh [SETTINGS] [LINES [WORKER]]
#
# Needs project, zone and name. LINES of what was printed before are shown, 100 by default.
# Of a slice of several hosts, WORKER is the number of one, 0 by default, or all.

# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

read_settings "$@"
need PROJECT ZONE NAME
lines=${ARGUMENTS[0]:-100}
check_form LINES "$lines" '[0-9]+'
which=all
((HOSTS == 1)) || which=0
which=${ARGUMENTS[1]:-$which}
check_form WORKER "$which" 'all|[0-9]+'
ARGUMENTS=("${ARGUMENTS[@]:2}")
no_more_arguments

on_workers "$(quote bash "$FOLDER/tpu_scripts/worker.sh" logs "$lines")" "$which"
