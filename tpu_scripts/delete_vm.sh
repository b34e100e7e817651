#!/usr/bin/env bash
# Deletes the TPU VM and its queued resource, with all that is on its disk.
#
#   delete_vm.sh [SETTINGS]
#
# Needs project, zone and name. The bucket is left alone.

# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

read_settings "$@"
no_more_arguments
need PROJECT ZONE NAME

find_state ACTIVE
case $STATE in
  ABSENT) say "there is no $NAME; nothing to delete" ;;
  DELETING) say "$NAME is being deleted already" ;;
  *) delete ;;
esac
