//! The experts of a step's rows, tile by tile: all that the host tells the device about a batch's adapters.

use std::sync::Arc;

use super::super::elementwise::RowCount;
use super::super::params::ROW_TILE as TILE;
use super::super::{CudaError, Device, DeviceBuffer, DeviceSlice, Event, Pinned, Stream};
use crate::backend::Gates;

/// Which experts each tile of 128 rows uses, and each row's gates for them.
///
/// A tile lists every expert that one of its rows uses, once: its entry. Entries of a tile ascend by the experts'
/// `order`, so a row that uses several experts adds them in the same order whatever else is in its tile.
#[derive(Debug)]
pub struct WorkList {
    max_rows: usize,
    max_entries: usize,
    /// `[1]` rows, `[tiles + 1]` first entries, `[entries]` slots.
    numbers: DeviceBuffer<u32>,
    /// `[entries, 128]`
    gates: DeviceBuffer<f32>,
    staging: Staging,
    event: Event,
    /// Seats of the tile in hand, after their order.
    tile: Vec<(u64, u32)>,
}

/// Where steps find an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seated {
    /// Its slot in every arena.
    pub seat: u32,
    /// See [`LowRank::order`](super::LowRank::order).
    pub order: u64,
}

#[derive(Debug)]
struct Staging {
    numbers: Pinned<u32>,
    gates: Pinned<f32>,
}

impl WorkList {
    /// Room for steps of up to `max_rows` rows, whose tiles name up to `max_entries` experts together.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`].
    pub fn new(device: &Arc<Device>, max_rows: usize, max_entries: usize) -> Result<Self, CudaError> {
        let numbers = 1 + max_rows.div_ceil(TILE) + 1 + max_entries;
        Ok(Self {
            max_rows,
            max_entries,
            numbers: DeviceBuffer::new(device, numbers, "the work list")?,
            gates: DeviceBuffer::new(device, max_entries * TILE, "gates")?,
            staging: Staging {
                numbers: Pinned::new(device, numbers, "the work list")?,
                gates: Pinned::new(device, max_entries * TILE, "gates")?,
            },
            event: device.event()?,
            tile: Vec::new(),
        })
    }

    /// Takes the rows of the next step, whose gates name slots; `order_of` gives the order of the expert in a slot.
    ///
    /// Queues two copies and does not wait for them; waits for the copies of the step before, if they are not done.
    ///
    /// # Errors
    /// [`CudaError::Shape`] when the step has more rows or entries than there is room for.
    pub fn set(
        &mut self,
        stream: &Stream,
        gates: &Gates,
        order_of: impl Fn(u32) -> u64,
    ) -> Result<(), CudaError> {
        self.set_seated(stream, gates, |slot| Some(Seated { seat: slot, order: order_of(slot) }))
    }

    /// [`set`](Self::set) for gates that name experts which `seated` finds; one that is nowhere changes nothing.
    pub fn set_seated(
        &mut self,
        stream: &Stream,
        gates: &Gates,
        seated: impl Fn(u32) -> Option<Seated>,
    ) -> Result<(), CudaError> {
        self.event.synchronize()?;
        let entries = self.fill(gates, seated)?;
        let numbers = self.first_slot() + entries;
        let Staging { numbers: from_numbers, gates: from_gates } = &self.staging;
        // SAFETY: page-locked memory of `self`, written next after the event behind the copies has been waited for.
        unsafe {
            stream.upload_async(&from_numbers[..numbers], self.numbers.slice(..numbers))?;
            stream.upload_async(&from_gates[..entries * TILE], self.gates.slice(..entries * TILE))?;
        }
        stream.record(&self.event)
    }

    /// Most rows of a step.
    pub fn max_rows(&self) -> usize {
        self.max_rows
    }

    /// The number of rows, for launches made for up to `bound` of them.
    pub fn row_count(&self, bound: usize, overlap: bool) -> RowCount<'_> {
        RowCount { count: self.numbers.slice(..1), bound, overlap }
    }

    /// `[entries, 128]`
    pub(super) fn gates(&self) -> DeviceSlice<'_, f32> {
        self.gates.slice(..)
    }

    /// Writes the staging memory and returns the number of entries.
    fn fill(&mut self, gates: &Gates, seated: impl Fn(u32) -> Option<Seated>) -> Result<usize, CudaError> {
        let rows = gates.rows();
        if rows > self.max_rows {
            return Err(CudaError::Shape(format!("{rows} rows in a work list for {}", self.max_rows)));
        }
        let first_slot = self.first_slot();
        let Staging { numbers, gates: values } = &mut self.staging;
        numbers[0] = rows as u32;
        let mut entries = 0;
        // Runs ascend by row: the first that can reach into the tile in hand.
        let mut runs = gates.runs();
        for tile in 0..rows.div_ceil(TILE) {
            numbers[1 + tile] = entries as u32;
            let tile_rows = tile * TILE..rows.min((tile + 1) * TILE);
            while runs.first().is_some_and(|run| run.rows.end <= tile_rows.start) {
                runs = &runs[1..];
            }
            let of_tile = runs.iter().take_while(|run| run.rows.start < tile_rows.end);

            self.tile.clear();
            for run in of_tile.clone() {
                let experts = gates.experts_of(run).iter().filter_map(|&expert| seated(expert));
                self.tile.extend(experts.map(|Seated { seat, order }| (order, seat)));
            }
            self.tile.sort_unstable();
            self.tile.dedup();
            if entries + self.tile.len() > self.max_entries {
                return Err(CudaError::Shape(format!(
                    "more than {} experts over the tiles of a step",
                    self.max_entries
                )));
            }

            for (i, &(_, seat)) in self.tile.iter().enumerate() {
                numbers[first_slot + entries + i] = seat;
            }
            values[entries * TILE..(entries + self.tile.len()) * TILE].fill(0.0);
            for run in of_tile {
                for (i, &expert) in gates.experts_of(run).iter().enumerate() {
                    let Some(Seated { seat, order }) = seated(expert) else { continue };
                    let place = self.tile.binary_search(&(order, seat));
                    let entry = entries + place.expect("all experts of the tile are in its list");
                    for row in run.rows.start.max(tile_rows.start)..run.rows.end.min(tile_rows.end) {
                        values[entry * TILE + row - tile_rows.start] = gates.gates_of(run, row)[i];
                    }
                }
            }
            entries += self.tile.len();
        }
        numbers[1 + rows.div_ceil(TILE)] = entries as u32;
        Ok(entries)
    }

    /// Where the slots of entries start among the numbers.
    fn first_slot(&self) -> usize {
        1 + self.max_rows.div_ceil(TILE) + 1
    }

    /// `[1]`: rows of the step.
    pub(super) fn rows_address(&self) -> u64 {
        self.numbers.address()
    }

    pub(super) fn tile_entries_address(&self) -> u64 {
        self.numbers.slice(1..).address()
    }

    pub(super) fn entry_slots_address(&self) -> u64 {
        self.numbers.slice(self.first_slot()..).address()
    }

    pub(super) fn gates_address(&self) -> u64 {
        self.gates.address()
    }
}
