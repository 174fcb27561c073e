//! How much memory this machine has.

use std::fs;

use serde::Serialize;

/// Memory in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Machine {
    /// In all, or as much as this process may have.
    pub total: u64,
    /// Not in use, or given up by caches when it is needed.
    pub available: u64,
}

impl Machine {
    /// Of this machine; `None` where it is not known.
    pub fn this() -> Option<Self> {
        let machine = Self::from_meminfo(&fs::read_to_string("/proc/meminfo").ok()?)?;
        // A container's bound; "max" where there is none.
        let bound = fs::read_to_string("/sys/fs/cgroup/memory.max").ok();
        Some(machine.bounded(bound.and_then(|bound| bound.trim().parse().ok())))
    }

    fn from_meminfo(text: &str) -> Option<Self> {
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
            kibibytes.checked_mul(1024)
        };
        Some(Self { total: field("MemTotal")?, available: field("MemAvailable")? })
    }

    fn bounded(self, bound: Option<u64>) -> Self {
        let bound = bound.unwrap_or(u64::MAX);
        Self { total: self.total.min(bound), available: self.available.min(bound) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_in_kibibytes_and_bounded_by_the_container() {
        let text = "MemTotal:       16314428 kB\nMemFree:          241848 kB\nMemAvailable:   13044888 kB\n";
        let machine = Machine::from_meminfo(text).unwrap();
        assert_eq!(machine, Machine { total: 16_314_428 << 10, available: 13_044_888 << 10 });
        assert_eq!(machine.bounded(None), machine);
        let bounded = machine.bounded(Some(14 << 30));
        assert_eq!(bounded, Machine { total: 14 << 30, available: 13_044_888 << 10 });
        assert_eq!(machine.bounded(Some(5)), Machine { total: 5, available: 5 });
        for text in [
            "",
            "MemTotal: 5 kB\n",
            "MemTotal: x kB\nMemAvailable: 1 kB\n",
            "MemTotal: 1\nMemAvailable: 1 kB",
        ] {
            assert_eq!(Machine::from_meminfo(text), None, "{text:?}");
        }
    }
}
