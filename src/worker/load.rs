//! How busy the machine is, as far as it concerns this process: the greater one of CPU and memory,
//! each within what the process may have of it. Linux tells; elsewhere only the own CPU counts.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use rustix::time::{ClockId, clock_gettime};

/// The weight of the newest second: a peak counts for some five of them.
const NEWEST: f32 = 0.3;

pub struct Meter {
    cores: f32,
    last: Reading,
    load: f32,
}

struct Reading {
    at: Instant,
    /// CPU time of this process.
    own: Duration,
    /// Ticks of all CPUs of the machine: busy, and all.
    machine: Option<(u64, u64)>,
}

impl Reading {
    fn now() -> Self {
        let own = clock_gettime(ClockId::ProcessCPUTime);
        let seconds = u64::try_from(own.tv_sec).unwrap_or_default();
        let nanos = u32::try_from(own.tv_nsec).unwrap_or_default();
        let stat = fs::read_to_string("/proc/stat").ok();
        Self {
            at: Instant::now(),
            own: Duration::new(seconds, nanos),
            machine: stat.as_deref().and_then(ticks),
        }
    }
}

impl Meter {
    pub fn start() -> Self {
        Self {
            // Within the quota of the control group, if there is one.
            cores: thread::available_parallelism().map_or(1.0, |n| n.get() as f32),
            last: Reading::now(),
            load: 0.0,
        }
    }

    /// From 0 to 1, averaged over the last seconds; to be asked about once a second.
    pub fn load(&mut self) -> f32 {
        let now = Reading::now();
        let wall = now.at.duration_since(self.last.at).as_secs_f32();
        let own = now.own.saturating_sub(self.last.own).as_secs_f32();
        let own = own / (wall.max(0.001) * self.cores);
        let machine = match (self.last.machine, now.machine) {
            (Some((busy, all)), Some((busy_now, all_now))) if all_now > all => {
                busy_now.saturating_sub(busy) as f32 / (all_now - all) as f32
            }
            _ => 0.0,
        };
        self.last = now;
        let cpu = own.max(machine).min(1.0);
        self.load += NEWEST * (cpu - self.load);
        self.load.max(memory().unwrap_or_default()).clamp(0.0, 1.0)
    }
}

/// Busy ticks and all ticks, from /proc/stat (proc_stat(5)).
fn ticks(stat: &str) -> Option<(u64, u64)> {
    let all = stat.lines().next()?.strip_prefix("cpu ")?;
    let numbers: Vec<u64> = all
        .split_whitespace()
        .map_while(|n| n.parse().ok())
        .collect();
    // user nice system idle iowait irq softirq steal; guests are in user already.
    let [_, _, _, idle, waiting, _, _, _] = *numbers.get(..8)? else {
        return None;
    };
    let all: u64 = numbers[..8].iter().sum();
    Some((all - idle - waiting, all))
}

/// The part of the memory that is taken: of the control group's, if it has a limit, or the
/// machine's, whichever is scarcer.
fn memory() -> Option<f32> {
    let machine = fs::read_to_string("/proc/meminfo").ok();
    let machine = machine.as_deref().and_then(of_machine);
    [machine, of_group()].into_iter().flatten().reduce(f32::max)
}

fn of_machine(meminfo: &str) -> Option<f32> {
    let kilobytes = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<f32>().ok()
    };
    let (total, available) = (kilobytes("MemTotal:")?, kilobytes("MemAvailable:")?);
    (total > 0.0).then(|| 1.0 - available / total)
}

/// Control groups, version 2.
fn of_group() -> Option<f32> {
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = own.lines().find_map(|line| line.strip_prefix("0::"))?;
    let read = |name: &str| fs::read_to_string(format!("/sys/fs/cgroup{path}/{name}")).ok();
    let limit: f32 = read("memory.max")?.trim().parse().ok()?;
    let taken: f32 = read("memory.current")?.trim().parse().ok()?;
    // Files that the kernel keeps for want of a better use are given up first.
    let spare = read("memory.stat").and_then(|stat| {
        let line = stat
            .lines()
            .find_map(|line| line.strip_prefix("inactive_file "))?;
        line.parse::<f32>().ok()
    });
    (limit > 0.0).then(|| (taken - spare.unwrap_or_default()).max(0.0) / limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machines_figures_are_read() {
        let stat = "cpu  10 5 5 70 10 0 0 0 3 0\ncpu0 1 2 3";
        assert_eq!(ticks(stat), Some((20, 100)));
        assert_eq!(ticks("cpu  10 5"), None);
        let meminfo = "MemTotal:        1000 kB\nMemFree: 1 kB\nMemAvailable:     250 kB\n";
        assert_eq!(of_machine(meminfo), Some(0.75));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_busy_process_has_a_load() {
        let mut meter = Meter::start();
        let begun = Instant::now();
        let mut sum = 0u64;
        while begun.elapsed() < Duration::from_millis(300) {
            sum = std::hint::black_box(sum + 1);
        }
        let own = meter.load();
        assert!(own > 0.0 && own <= 1.0, "{own}");
        assert!(memory().is_some_and(|taken| taken > 0.0 && taken < 1.0));
    }
}
