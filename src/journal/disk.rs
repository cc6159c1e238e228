//! The file, its lock, and how one is put in the place of another.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

/// What the journal asks of a disk.
pub(super) trait Medium: Send + 'static {
    fn append(&mut self, lines: &[u8]) -> io::Result<()>;
    /// Puts a file with these lines, synced, in the place of the one there is.
    fn rewrite(&mut self, lines: &[u8]) -> io::Result<()>;
    /// Whether what is appended can be found again.
    fn intact(&self) -> io::Result<()>;
    fn size(&self) -> u64;
    fn file(&self) -> Arc<dyn Syncable>;
}

pub(super) trait Syncable: Send + Sync {
    fn sync(&self) -> io::Result<()>;
}

impl Syncable for File {
    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }
}

pub(super) struct Disk {
    path: PathBuf,
    /// Holds the lock. A file of its own, since the journal itself is replaced.
    lock: File,
    file: Arc<File>,
    size: u64,
}

impl Disk {
    /// # Errors
    /// `WouldBlock` if another process has it.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let lock = Self::lock(path)?;
        let file = Self::options().append(true).open(path)?;
        let size = file.metadata()?.len();
        Ok(Self {
            path: path.to_owned(),
            lock,
            file: Arc::new(file),
            size,
        })
    }

    fn options() -> OpenOptions {
        let mut options = OpenOptions::new();
        options.create(true).mode(0o600);
        options
    }

    fn lock_path(path: &Path) -> PathBuf {
        path.with_extension("lock")
    }

    fn lock(path: &Path) -> io::Result<File> {
        let dir = path.parent().unwrap_or(Path::new("."));
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let lock = Self::options().append(true).open(Self::lock_path(path))?;
        match lock.try_lock() {
            Ok(()) => Ok(lock),
            Err(TryLockError::WouldBlock) => Err(io::ErrorKind::WouldBlock.into()),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }
}

/// Whether a process holds the lock of this journal, without trying to get it, which would keep out a
/// daemon that starts at that moment. None where the system does not tell.
pub(super) fn is_locked(path: &Path) -> Option<bool> {
    let locks = fs::read_to_string("/proc/locks").ok()?;
    let Ok(lock) = fs::metadata(Disk::lock_path(path)) else {
        return Some(false);
    };
    // `1: FLOCK  ADVISORY  WRITE 1234 fe:00:5678 0 EOF`, the file's device and inode in it.
    let inode = format!(":{} ", lock.ino());
    let ours = |line: &str| line.contains(" FLOCK ") && line.contains(&inode);
    Some(locks.lines().any(ours))
}

/// Whether the path still leads to the file that was opened by it.
fn there(file: &File, path: &Path) -> io::Result<bool> {
    let ours = file.metadata()?;
    match fs::metadata(path) {
        Ok(found) => Ok((found.dev(), found.ino()) == (ours.dev(), ours.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

impl Medium for Disk {
    fn append(&mut self, lines: &[u8]) -> io::Result<()> {
        (&*self.file).write_all(lines)?;
        self.size += lines.len() as u64;
        Ok(())
    }

    fn rewrite(&mut self, lines: &[u8]) -> io::Result<()> {
        let lock_path = Self::lock_path(&self.path);
        if !there(&self.lock, &lock_path)? {
            self.lock = Self::lock(&self.path)?;
        }
        let new = self.path.with_extension("journal.new");
        // Not the one that an earlier failure left: whoever reads it, it is not ours.
        if let Err(error) = fs::remove_file(&new)
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(error);
        }
        let mut file = Self::options().append(true).open(&new)?;
        file.write_all(lines)?;
        file.sync_all()?;
        fs::rename(&new, &self.path)?;
        // Without this a power loss may bring back the old one.
        let dir = self.path.parent().unwrap_or(Path::new("."));
        File::open(dir)?.sync_all()?;
        self.file = Arc::new(file);
        self.size = lines.len() as u64;
        Ok(())
    }

    fn intact(&self) -> io::Result<()> {
        match there(&self.file, &self.path) {
            Ok(true) => Ok(()),
            Ok(false) => Err(io::Error::other("somebody removed or replaced it")),
            Err(error) => Err(error),
        }
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn file(&self) -> Arc<dyn Syncable> {
        self.file.clone()
    }
}
