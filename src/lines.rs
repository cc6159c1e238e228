//! Lines written by a thread of their own: a pipe that nobody reads, or a disk that hangs, must not
//! hold up the tasks that close streams.

use std::{
    io::{self, Write},
    sync::{
        Arc,
        mpsc::{self, SyncSender, TrySendError},
    },
    time::{Duration, Instant},
};

use tracing_subscriber::fmt::MakeWriter;

/// Lines that wait to be written; beyond that they are dropped.
const MAX_LINES: usize = 4096;
/// How often a full queue is looked at again while it is flushed.
const RETRY: Duration = Duration::from_millis(5);

enum Message {
    Line(Vec<u8>),
    /// Answered when everything before it is written.
    Flush(SyncSender<()>),
}

/// Cheap to clone; the thread ends with the last clone.
#[derive(Clone)]
pub struct LineWriter(SyncSender<Message>);

impl LineWriter {
    /// `failed` is told of the first error of each series of them.
    pub fn start(
        mut out: impl Write + Send + 'static,
        failed: impl Fn(io::Error) + Send + 'static,
    ) -> io::Result<Self> {
        let (messages, queued) = mpsc::sync_channel(MAX_LINES);
        let thread = std::thread::Builder::new().name("lines".into());
        thread.spawn(move || {
            let mut failing = false;
            for message in queued {
                match message {
                    Message::Line(line) => {
                        // One write a line, so that a crash leaves no half of one.
                        let written = out.write_all(&line).and_then(|()| out.flush());
                        let was_failing = std::mem::replace(&mut failing, written.is_err());
                        if let Err(error) = written
                            && !was_failing
                        {
                            failed(error);
                        }
                    }
                    Message::Flush(done) => {
                        let _ = done.try_send(());
                    }
                }
            }
        })?;
        Ok(Self(messages))
    }

    /// Queues a line, its end included. Never blocks; false when there is no room for it.
    #[must_use]
    pub fn write(&self, line: Vec<u8>) -> bool {
        !matches!(
            self.0.try_send(Message::Line(line)),
            Err(TrySendError::Full(_))
        )
    }

    /// Blocks until what is queued is written, or until the given instant; false in that case.
    pub fn flush(&self, until: Instant) -> bool {
        let (done, written) = mpsc::sync_channel(1);
        let mut message = Message::Flush(done);
        loop {
            match self.0.try_send(message) {
                Ok(()) => break,
                Err(TrySendError::Full(back)) if Instant::now() + RETRY < until => {
                    message = back;
                    #[allow(
                        clippy::disallowed_methods,
                        reason = "blocks by design, bounded, when the runtime is done"
                    )]
                    std::thread::sleep(RETRY);
                }
                Err(_) => return false,
            }
        }
        let left = until.saturating_duration_since(Instant::now());
        written.recv_timeout(left).is_ok()
    }
}

/// For logs: each event is one write.
pub struct LogLine(Arc<LineWriter>);

impl Write for LogLine {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        // Saying that logs are lost would need the log.
        let _ = self.0.write(line.to_vec());
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Makes the log's lines.
pub struct LogWriter(pub Arc<LineWriter>);

impl MakeWriter<'_> for LogWriter {
    type Writer = LogLine;

    fn make_writer(&self) -> LogLine {
        LogLine(self.0.clone())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, mpsc::Receiver};

    use super::*;

    const SOON: Duration = Duration::from_millis(20);
    const LIMIT: Duration = Duration::from_secs(30);

    /// Takes nothing until its gate is opened, like a pipe that nobody reads.
    struct Stuck(Receiver<()>, Arc<Mutex<usize>>);

    impl Write for Stuck {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.0.recv();
            *self.1.lock().unwrap() += 1;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_that_hangs_blocks_nobody_and_costs_only_what_does_not_fit() {
        let (gate, shut) = mpsc::sync_channel(0);
        let written = Arc::default();
        let writer = LineWriter::start(Stuck(shut, Arc::clone(&written)), |_| {}).expect("thread");
        let taken = (0..2 * MAX_LINES)
            .filter(|_| writer.write(b"x".to_vec()))
            .count();
        // One may have been taken from the queue before it was full.
        assert!((MAX_LINES..=MAX_LINES + 1).contains(&taken), "{taken}");
        assert!(!writer.flush(Instant::now() + SOON), "it cannot be written");
        drop(gate);
        assert!(writer.flush(Instant::now() + LIMIT));
        assert_eq!(*written.lock().unwrap(), taken);
    }

    #[test]
    fn a_series_of_failures_is_told_once() {
        struct Broken;
        impl Write for Broken {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (told, failures) = mpsc::channel();
        let failed = move |error: io::Error| told.send(error.kind()).expect("listening");
        let writer = LineWriter::start(Broken, failed).expect("thread");
        assert!(writer.write(b"a".to_vec()) && writer.write(b"b".to_vec()));
        assert!(writer.flush(Instant::now() + LIMIT));
        assert_eq!(
            failures.try_iter().collect::<Vec<_>>(),
            [io::ErrorKind::BrokenPipe]
        );
    }
}
