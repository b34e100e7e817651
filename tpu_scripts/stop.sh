#!/usr/bin/env bash
# Asks the experiment to stop; it saves first, and the same launch.sh goes on from there.
#
#   stop.sh [SETTINGS]
#
# Needs project, zone and name. On a slice of several hosts a stop.sh five minutes later kills
# what did not come to it. The TPU VM stays, and is paid for: see delete_vm.sh.

# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

read_settings "$@"
no_more_arguments
need PROJECT ZONE NAME

worker stop
