#!/usr/bin/env bash
# Shows what the experiment prints, and goes on showing it until Ctrl-C.
#
#   logs.sh [SETTINGS] [LINES]
#
# Needs project, zone and name. LINES of what was printed before are shown, 100 by default.

# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

read_settings "$@"
need PROJECT ZONE NAME
lines=${ARGUMENTS[0]:-100}
check_form LINES "$lines" '[0-9]+'
ARGUMENTS=("${ARGUMENTS[@]:1}")
no_more_arguments

worker logs "$lines"
