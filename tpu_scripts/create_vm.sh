#!/usr/bin/env bash
# Requests a TPU VM from the queue and waits until it is there.
#
#   create_vm.sh [SETTINGS]
#
# Needs project, zone, name, type and capacity. Where the resource exists already, it only
# waits for it. Waiting may take hours; Ctrl-C leaves the request in the queue, and the
# same command waits again.

# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

read_settings "$@"
no_more_arguments
need PROJECT ZONE NAME TYPE CAPACITY

find_state ABSENT
if [[ $STATE == ABSENT ]]; then
  create
else
  say "$NAME exists already ($STATE); nothing to create"
fi
wait_until_active
