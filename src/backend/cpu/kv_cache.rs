//! Paged keys and values.
//!
//! A page holds 16 tokens of one block. Keys lie `[kv_head][head_dim][16]`, so that one vector of keys serves a score
//! without a horizontal sum; values lie `[kv_head][16][head_dim]`.

use crate::backend::{AttentionShape, PAGE};

pub struct KvCache {
    pub(super) shape: AttentionShape,
    pages: usize,
    blocks: Vec<BlockPages>,
}

struct BlockPages {
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl KvCache {
    pub(super) fn new(blocks: usize, pages: usize, shape: AttentionShape) -> Self {
        let len = pages * shape.kv_heads * shape.head_dim * PAGE;
        // Zeroed memory comes from the system lazily: an unused page takes no room.
        let blocks =
            (0..blocks).map(|_| BlockPages { keys: vec![0.0; len], values: vec![0.0; len] }).collect();
        Self { shape, pages, blocks }
    }

    /// Elements of one head of one page, of keys or of values.
    fn head_len(&self) -> usize {
        self.shape.head_dim * PAGE
    }

    fn head_start(&self, page: u32, head: usize) -> usize {
        assert!((page as usize) < self.pages, "page outside the cache");
        (page as usize * self.shape.kv_heads + head) * self.head_len()
    }

    /// Keys `[head_dim, 16]` of one head in one page.
    pub(super) fn keys(&self, block: usize, page: u32, head: usize) -> &[f32] {
        let start = self.head_start(page, head);
        &self.blocks[block].keys[start..start + self.head_len()]
    }

    /// Values `[16, head_dim]` of one head in one page.
    pub(super) fn values(&self, block: usize, page: u32, head: usize) -> &[f32] {
        let start = self.head_start(page, head);
        &self.blocks[block].values[start..start + self.head_len()]
    }

    /// Stores the key and value vectors `[kv_heads, head_dim]` of the token at `position` of the sequence of `pages`.
    pub(super) fn store(
        &mut self,
        block: usize,
        pages: &[u32],
        position: usize,
        keys: &[f32],
        values: &[f32],
    ) {
        let (page, slot) = (pages[position / PAGE], position % PAGE);
        let head_dim = self.shape.head_dim;
        for head in 0..self.shape.kv_heads {
            let start = self.head_start(page, head);
            let len = self.head_len();
            let from = head * head_dim..(head + 1) * head_dim;
            let BlockPages { keys: key_pages, values: value_pages } = &mut self.blocks[block];
            let column = key_pages[start..start + len].iter_mut().skip(slot).step_by(PAGE);
            for (to, key) in column.zip(&keys[from.clone()]) {
                *to = *key;
            }
            value_pages[start..start + len][slot * head_dim..(slot + 1) * head_dim]
                .copy_from_slice(&values[from]);
        }
    }
}
