//! Who owns which page of the KV cache.

/// The free pages.
pub(super) struct PagePool {
    free: Vec<u32>,
    total: usize,
}

impl PagePool {
    pub fn new(total: usize) -> Self {
        Self { free: (0..total as u32).rev().collect(), total }
    }

    pub fn total(&self) -> usize {
        self.total
    }

    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Grows `pages` to `wanted` pages. When there are not enough, `pages` stays as it is.
    pub fn grow(&mut self, pages: &mut Vec<u32>, wanted: usize) -> bool {
        let missing = wanted.saturating_sub(pages.len());
        if missing > self.free.len() {
            return false;
        }
        pages.extend(self.free.drain(self.free.len() - missing..).rev());
        true
    }

    /// Takes all `pages` back.
    pub fn release(&mut self, pages: &mut Vec<u32>) {
        self.free.append(pages);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_handed_out_once_and_come_back() {
        let mut pool = PagePool::new(3);
        let (mut a, mut b) = (Vec::new(), Vec::new());
        assert!(pool.grow(&mut a, 2) && pool.grow(&mut b, 1));
        assert!(!pool.grow(&mut a, 3), "none left");
        let mut all = [a.clone(), b.clone()].concat();
        all.sort_unstable();
        assert_eq!(all, [0, 1, 2]);
        pool.release(&mut b);
        assert!(pool.grow(&mut a, 3));
        assert_eq!((a.len(), b.len(), pool.free(), pool.total()), (3, 0, 0, 3));
    }
}
