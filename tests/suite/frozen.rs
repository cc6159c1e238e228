//! A disk that hangs, and one that is full, for real: a file system of its own. It needs root, loop devices
//! and a mount, so it is run only with ROOMWARDEN_FROZEN_DISK=1.

use std::{fs, io::Write, path::Path, process::Command};

use roomwarden::{cli::EXIT_OK, store::Reader};

use crate::stage::{Binary, Stage};

fn run(program: &str, arguments: &[&str]) -> bool {
    let status = Command::new(program).args(arguments).status();
    status.is_ok_and(|status| status.success())
}

/// A mounted file system; thawed and unmounted in the end.
struct Volume {
    _image: tempfile::NamedTempFile,
    mounted: tempfile::TempDir,
}

impl Volume {
    fn new() -> Self {
        let image = tempfile::NamedTempFile::new().expect("image");
        image.as_file().set_len(16 << 20).expect("16 MiB");
        let mounted = tempfile::tempdir().expect("mount point");
        let volume = Self {
            _image: image,
            mounted,
        };
        let image = volume._image.path().to_str().expect("text");
        assert!(run("mkfs.ext4", &["-q", image]), "mkfs.ext4");
        let mount = ["-o", "loop", image, volume.path()];
        assert!(run("mount", &mount), "mount");
        volume
    }

    fn path(&self) -> &str {
        self.mounted.path().to_str().expect("text")
    }

    fn freeze(&self) {
        assert!(run("fsfreeze", &["--freeze", self.path()]), "fsfreeze");
    }

    fn thaw(&self) -> bool {
        run("fsfreeze", &["--unfreeze", self.path()])
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let _ = self.thaw();
        let _ = run("umount", &["--lazy", self.path()]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_hangs_keeps_no_stream_from_opening_or_closing() {
    if std::env::var_os("ROOMWARDEN_FROZEN_DISK").is_none() {
        println!("skipped: ROOMWARDEN_FROZEN_DISK is not set");
        return;
    }
    let volume = Volume::new();
    let state = Path::new(volume.path()).join("state");
    let variables = [("ROOMWARDEN__STATE__DIR", state.to_str().expect("text"))];
    let stage = Stage::new().await;
    let mut binary = Binary::run(&stage, &variables);
    let alice = stage.speaker("r", "alice").await;
    stage.streaming(1).await;

    volume.freeze();
    let bob = stage.speaker("r", "bob").await;
    stage.streaming(2).await;
    binary.logged("disk does not answer within").await;
    alice.leave().await;
    stage
        .witnessed("alice's stream closes", |w| w.open_now == 1)
        .await;
    binary.signal("TERM");
    stage.all_acknowledged(2).await;
    binary
        .logged("the last receipts are not in the journal")
        .await;

    // A thread that waits for a disk can't be ended, not by SIGKILL either, and its process stays.
    assert!(volume.thaw());
    let (status, log) = binary.exit().await;
    assert_eq!(status.code(), Some(EXIT_OK.into()), "{log}");
    bob.leave().await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_told_costs_no_stream_and_is_caught_up_with() {
    if std::env::var_os("ROOMWARDEN_FROZEN_DISK").is_none() {
        println!("skipped: ROOMWARDEN_FROZEN_DISK is not set");
        return;
    }
    let volume = Volume::new();
    let state = Path::new(volume.path()).join("state");
    let variables = [("ROOMWARDEN__STATE__DIR", state.to_str().expect("text"))];
    let stage = Stage::new().await;
    let mut binary = Binary::run(&stage, &variables);
    binary.logged("journal opened").await;
    let filling = Path::new(volume.path()).join("filling");
    let mut file = fs::File::create(&filling).expect("made");
    for size in [1 << 20, 4096, 1] {
        while file.write_all(&vec![0; size]).is_ok() {}
    }
    // More than fits into blocks that are there already.
    for n in 0..8 {
        let speaker = stage.speaker("r", &format!("speaker-{n}")).await;
        stage.streaming(1).await;
        speaker.leave().await;
        stage.witnessed("closed", |w| w.open_now == 0).await;
    }
    binary.logged("the ledger can't be written").await;
    fs::remove_file(&filling).expect("removed");
    drop(file);
    binary.logged("the ledger can be written again").await;
    binary.signal("TERM");
    let (status, log) = binary.exit().await;
    assert_eq!(status.code(), Some(EXIT_OK.into()), "{log}");
    assert_eq!(
        log.matches("the ledger can't be written").count(),
        1,
        "{log}"
    );
    stage.all_acknowledged(8).await;
    let reader = Reader::open(&state.join("roomwarden.db")).expect("readable");
    assert_eq!(reader.latest(100).expect("read").len(), 8);
    drop(reader);
    stage.end().await;
}
