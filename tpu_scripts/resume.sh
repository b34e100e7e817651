#!/usr/bin/env bash
# After a preemption: a new TPU VM, set up as the last one, with the experiment going on.
#
#   resume.sh [SETTINGS]
#
# Needs project, zone, name, type and capacity; the command and the bucket are those that
# launch.sh recorded, the project is what setup_vm.sh copied. It takes those of the steps
# that are missing, so it may be run at any time: while the experiment runs it changes
# nothing, and it does not launch again what has finished.

# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

read_settings "$@"
no_more_arguments
need PROJECT ZONE NAME TYPE CAPACITY
for file in project.tar.gz command; do
  [[ -e $RECORD/$file ]] ||
    die "there is no $RECORD/$file; setup_vm.sh and launch.sh write it, run them first"
done
mapfile -d '' -t command <"$RECORD/command"

find_state SUSPENDED
while [[ $STATE == SUSPENDING || $STATE == DELETING ]]; do
  say "$NAME is $STATE; looking again in $POLL s"
  sleep "$POLL"
  find_state SUSPENDED
done
case $STATE in
  SUSPENDED | FAILED)
    say "# $NAME is $STATE: it is replaced"
    delete
    create
    ;;
  ABSENT) create ;;
  *) say "$NAME exists already ($STATE)" ;;
esac
wait_until_active

status=0
set_up "$RECORD/project.tar.gz" || status=$?
((status == 0 || status == BUSY)) || die "setting up $NAME failed"
launch "${command[@]}"
