//! A small model's site groups, adapters for them, and what a directly loaded arena holds.

use loramux::backend::cuda::experts::ExpertMemory;
use loramux::backend::cuda::lora::{ArenaShape, ChunkArena, LowRank, Site, SiteGroup, SlotContent};
use loramux::backend::cuda::{CudaError, DeviceBuffer, Half, Stream};

use crate::cuda_device::device;
use crate::element::element;
use crate::random::Random;

/// Widths of the sites of each group; the last is a lookup.
const WIDTHS: [&[[usize; 2]]; 3] = [&[[64, 40], [64, 24]], &[[40, 64]], &[[30, 13]]];
const LOOKUP: usize = 2;

/// Ranks of four chunks fit a slot.
pub const MAX_RANK: usize = 64;

/// Every site: `[group, site]`.
pub fn sites() -> impl Iterator<Item = [usize; 2]> {
    WIDTHS.iter().enumerate().flat_map(|(group, sites)| (0..sites.len()).map(move |site| [group, site]))
}

pub struct Pair {
    pub site: [usize; 2],
    pub rank: usize,
    pub a: Vec<Half>,
    pub b: Vec<Half>,
    pub column_scale: Option<Vec<f32>>,
    pub bias: Option<Vec<f32>>,
}

pub struct Adapter {
    pub pairs: Vec<Pair>,
    pub scale: f32,
    pub order: u64,
}

impl Adapter {
    /// `rank_of(site)`, none where it is no target.
    pub fn new(random: &mut Random, rank_of: impl Fn(&mut Random, [usize; 2]) -> Option<usize>) -> Self {
        let mut pairs = Vec::new();
        for site in sites() {
            let Some(rank) = rank_of(random, site) else { continue };
            let [input, output] = WIDTHS[site[0]][site[1]];
            pairs.push(Pair {
                site,
                rank,
                a: random.values(rank * input, 0.2),
                b: random.values(rank * output, 0.5),
                column_scale: None,
                bias: None,
            });
        }
        Self { pairs, scale: random.number().abs() + 0.25, order: random.next() }
    }

    /// Of one rank at every site.
    pub fn of_rank(random: &mut Random, rank: usize) -> Self {
        Self::new(random, |_, _| Some(rank))
    }

    /// Some sites, of ranks of up to four chunks, some with columns, some with nothing but columns.
    pub fn any(random: &mut Random) -> Self {
        let mut adapter = Self::new(random, |random, site| {
            let rank = [0, 1, 8, 16, 17, 33, 64][random.below(7)];
            (random.below(4) > 0 && (rank > 0 || site[0] != LOOKUP)).then_some(rank)
        });
        for pair in adapter.pairs.iter_mut().filter(|pair| pair.site[0] != LOOKUP) {
            let width = WIDTHS[pair.site[0]][pair.site[1]][1];
            pair.column_scale = (random.below(3) == 0).then(|| random.floats(width));
            pair.bias = (pair.rank == 0 || random.below(3) == 0).then(|| random.floats(width));
        }
        if adapter.pairs.is_empty() { Self::any(random) } else { adapter }
    }

    /// A bias and no rank, at every site that has outputs to add to.
    pub fn of_bias(random: &mut Random) -> Self {
        let mut adapter = Self::new(random, |_, site| (site[0] != LOOKUP).then_some(0));
        for pair in &mut adapter.pairs {
            pair.bias = Some(random.floats(WIDTHS[pair.site[0]][pair.site[1]][1]));
        }
        adapter
    }

    pub fn pair(&self, site: [usize; 2]) -> Option<LowRank<'_>> {
        self.pairs.iter().find(|pair| pair.site == site).map(|pair| self.low_rank(pair))
    }

    pub fn low_rank<'a>(&self, pair: &'a Pair) -> LowRank<'a> {
        LowRank {
            rank: pair.rank,
            a: &pair.a,
            b: &pair.b,
            scale: self.scale,
            column_scale: pair.column_scale.as_deref(),
            bias: pair.bias.as_deref(),
            order: self.order,
        }
    }

    /// Rank chunks at a site.
    pub fn chunks(&self, site: [usize; 2]) -> usize {
        self.pair(site).map_or(0, |pair| pair.rank.div_ceil(16))
    }
}

/// A model on the device, and the memory of its experts.
pub struct Fixture {
    // Waits for its copies before the arenas go.
    pub memory: ExpertMemory,
    pub groups: Vec<SiteGroup>,
    pub stream: Stream,
}

impl Fixture {
    /// With as many seats, and so many rank chunks at every site.
    pub fn new(seats: usize, chunks: usize) -> Self {
        let stream = device().stream().expect("a stream");
        Self {
            memory: ExpertMemory::new(stream.device(), seats).expect("a memory"),
            groups: groups(&stream, seats, chunks),
            stream,
        }
    }

    pub fn stage(&mut self, number: u32, adapter: &Adapter) {
        for pair in &adapter.pairs {
            let staged = self.memory.stage(&mut self.groups, number, pair.site, &adapter.low_rank(pair));
            staged.expect("staged");
        }
    }

    pub fn bring(&mut self, wanted: &[u32], kept: &[u32]) -> Result<bool, CudaError> {
        self.memory.bring(&mut self.groups, wanted, kept, &self.stream)
    }

    /// Brings what fits, and waits for it.
    pub fn bring_and_wait(&mut self, wanted: &[u32], kept: &[u32]) {
        self.bring(wanted, kept).expect("brought");
        for &number in wanted {
            self.memory.wait(number).expect("a seat");
        }
    }

    pub fn remove(&mut self, number: u32) {
        self.memory.remove(&mut self.groups, number).expect("removed");
    }

    /// Those of `numbers` that are ready.
    pub fn ready(&self, numbers: impl IntoIterator<Item = u32>) -> Vec<u32> {
        numbers.into_iter().filter(|&number| self.memory.seat(number).is_some()).collect()
    }

    pub fn arena(&self, [group, site]: [usize; 2]) -> &ChunkArena {
        &self.groups[group].sites()[site].chunks
    }

    /// The seat of `number` holds what loading `adapter` there would leave.
    pub fn assert_holds(&self, number: u32, adapter: &Adapter) {
        let seat = self.memory.seat(number).expect("ready") as usize;
        for site in sites() {
            let content = self.arena(site).read(&self.stream, seat).expect("a slot");
            let wanted = loaded(&self.stream, self.arena(site).shape(), adapter.pair(site));
            assert!(content == wanted, "expert {number} in seat {seat} at site {site:?}");
        }
    }
}

/// The groups with zero weights, and empty arenas.
pub fn groups(stream: &Stream, seats: usize, chunks: usize) -> Vec<SiteGroup> {
    let of_group = |(group, widths): (usize, &&[[usize; 2]])| {
        let sites = widths.iter().map(|&[input, output]| {
            let weight = DeviceBuffer::new(stream.device(), input * output, "a weight").expect("memory");
            stream.upload(&vec![Half::ZERO; input * output], &weight).expect("a copy");
            let lookup = group == LOOKUP;
            let shape = ArenaShape {
                element: element(),
                in_features: input,
                out_features: output,
                lookup,
                chunks,
                slots: seats,
                max_rank: MAX_RANK,
            };
            let chunks = ChunkArena::with_shape(stream, shape).expect("an arena");
            Site { weight, bias: None, chunks }
        });
        SiteGroup::new(stream.device(), sites.collect(), 16, chunks).expect("a group")
    };
    WIDTHS.iter().enumerate().map(of_group).collect()
}

/// What [`ChunkArena::load`] leaves in an arena of its own.
fn loaded(stream: &Stream, shape: &ArenaShape, pair: Option<LowRank<'_>>) -> SlotContent {
    let Some(pair) = pair else { return SlotContent::default() };
    let shape = ArenaShape { chunks: shape.chunks_per_slot(), slots: 2, ..*shape };
    let mut arena = ChunkArena::with_shape(stream, shape).expect("an arena");
    arena.load(stream, 1, &pair).expect("loaded");
    arena.read(stream, 1).expect("a slot")
}
