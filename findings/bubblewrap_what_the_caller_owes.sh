#!/usr/bin/env bash
# bubblewrap 0.8.0 (Debian 12): four things that it leaves to the one who calls it.
#   --die-with-parent follows the thread that started it: a sandbox ends with that thread, its process goes on
#   without --dev, /dev/null cannot be written under a read-only root: it is an ordinary file there, or none
#   without --unshare-pid all processes of the machine are seen
#   its own root is in memory and can be written, until --remount-ro
# Output seen: the lines under "expected". Needs bwrap and user namespaces (Debian: apt-get install bubblewrap).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
[[ $(bwrap --version) == "bubblewrap 0.8.0" ]] || echo "another version: $(bwrap --version)" >&2
cat > "$folder/expected" <<'END'
thread ended: exit -9
process goes on: exit 0
no --dev: cannot write /dev/null
--dev: wrote /dev/null
no --unshare-pid: more than 10 processes
--unshare-pid: at most 3 processes
no --remount-ro: wrote to /
--remount-ro: cannot write to /
END
python3 - > "$folder/seen" <<'END'
import subprocess
import threading
import time

BASE = ["bwrap", "--unshare-user", "--ro-bind", "/usr", "/usr", "--symlink", "usr/lib", "/lib"]
BASE += ["--symlink", "usr/lib64", "/lib64", "--symlink", "usr/bin", "/bin"]


def in_thread(then):
    started = []

    def start():
        started.append(subprocess.Popen([*BASE, "--die-with-parent", "sleep", "2"]))
        time.sleep(0.5)
        then.wait()

    threading.Thread(target=start).start()
    while not started:
        time.sleep(0.01)
    return started[0]


def sh(command, *options):
    return subprocess.run([*BASE, *options, "sh", "-c", command], capture_output=True, text=True)


done = threading.Event()
done.set()
print("thread ended: exit", in_thread(done).wait())
stays = threading.Event()
print("process goes on: exit", in_thread(stays).wait())
stays.set()
write = "echo x > /dev/null"
print("no --dev:", "wrote /dev/null" if sh(write, "--remount-ro", "/").returncode == 0 else "cannot write /dev/null")
kept = sh(write, "--dev", "/dev", "--remount-ro", "/")
print("--dev:", "wrote /dev/null" if kept.returncode == 0 else "cannot write /dev/null")
count = "set -- /proc/[0-9]*; echo $#"
seen = int(sh(count, "--proc", "/proc").stdout)
print("no --unshare-pid:", "more than 10 processes" if seen > 10 else f"{seen} processes")
seen = int(sh(count, "--unshare-pid", "--proc", "/proc").stdout)
print("--unshare-pid:", "at most 3 processes" if seen <= 3 else f"{seen} processes")
for options in ((), ("--remount-ro", "/")):
    wrote = sh("echo x > /file", *options).returncode == 0
    print(f"{'' if options else 'no '}--remount-ro:", "wrote to /" if wrote else "cannot write to /")
END
diff "$folder/expected" "$folder/seen"
