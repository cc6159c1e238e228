//! The real binary as PID 1, as in a container without an init.

use std::{fs, path::Path, time::Duration};

use roomwarden::cli::EXIT_OK;
use tokio::process::Command;

use crate::stage::{Binary, LIMIT, Stage, send};

/// Processes whose parent is this one, as the world outside numbers them.
fn children(pid: u32) -> Vec<u32> {
    let list = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let list = list.expect("its children");
    list.split_whitespace()
        .map(|pid| pid.parse().expect("a number"))
        .collect()
}

/// Looks again until there is something.
async fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let found = async {
        loop {
            if let Some(found) = look() {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let found = tokio::time::timeout(LIMIT, found).await;
    found.unwrap_or_else(|_| panic!("never: {what}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn as_pid_1_it_hears_signals_and_leaves_no_zombies() {
    let unshare = ["--pid", "--fork", "--mount-proc", "--kill-child"];
    let allowed = Command::new("unshare").args(unshare).arg("true").output();
    match allowed.await {
        Ok(output) if output.status.success() => {}
        refused => {
            println!("skipped: no PID namespace of one's own here: {refused:?}");
            return;
        }
    }
    let stage = Stage::new().await;
    let binary = Binary::command(&stage, &[]);
    let program = Path::new(binary.as_std().get_program()).to_owned();
    let mut contained = Command::new("unshare");
    contained
        .args(unshare)
        // What the shell leaves behind is the daemon's, as what loses its parent would be.
        .args(["sh", "-c", "sleep 1000 & exec \"$0\" run"])
        .arg(program)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .envs(stage.environment())
        .stdout(std::process::Stdio::null());
    let mut binary = Binary::start(contained);
    binary.logged("journal opened").await;
    let alice = stage.speaker("r", "alice").await;
    stage.streaming(1).await;

    let daemon = children(binary.pid())[0];
    let name = fs::read_to_string(format!("/proc/{daemon}/status")).expect("its status");
    assert!(
        name.lines()
            .any(|line| line.starts_with("NSpid:") && line.ends_with("\t1")),
        "{name}"
    );
    let [orphan] = children(daemon)[..] else {
        panic!("{:?}", children(daemon));
    };
    send("TERM", orphan);
    until("the orphan is reaped", || {
        children(daemon).is_empty().then_some(())
    })
    .await;

    send("TERM", daemon);
    let (status, log) = binary.exit().await;
    assert_eq!(status.code(), Some(EXIT_OK.into()), "{log}");
    stage.all_acknowledged(1).await;
    alice.leave().await;
    stage.end().await;
}
