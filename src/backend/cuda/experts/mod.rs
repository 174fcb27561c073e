//! Adapters beyond what the device holds: they live in page-locked host memory and move into the arenas of their sites
//! when a step needs them.
//!
//! An *expert* has a number of the caller's. A *seat* is a slot, the same in the [`ChunkArena`] of every site: a resident
//! expert has one, and rank chunks of every arena that it changes. [`ExpertMemory::bring`] gives seats to the experts
//! that a step wants and takes them from those used longest ago; the copies run on a stream of their own while steps go
//! on. The scheduler asks again before the next step, and admits a sequence when its experts are there.
//!
//! # Why no event is waited for by the stream of the steps
//!
//! - *A step reads what was copied.* [`ExpertMemory::seat`] names an expert only after the host has seen the event behind
//!   its copies, and the step that uses the seat is queued after that.
//! - *A copy overwrites what a step reads.* Only what an expert has lost can be overwritten. No step that is queued later
//!   uses that expert. Those queued earlier are before the event that is recorded on their stream in the same call, and
//!   the stream of the copies waits for it: once for all that was lost until then, since its copies run in order.
//! - *The host writes what a copy reads.* An expert's block also holds its entry and chunk ids in the arenas, written
//!   when copies begin. A seat is taken only from an expert whose copies are done; memory of one that was removed before
//!   that is kept until they are.
//!
//! [`ChunkArena`]: super::lora::ChunkArena

mod staged;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use super::lora::{ChunkArena, LowRank, PairLayout, SiteGroup};
use super::params::{MAX_SITES, SlotChunks};
use super::{CudaError, Device, Event, Pinned, Stream};

pub use staged::StagedExpert;

/// The experts of a model, and which of them are on the device.
///
/// It has no arenas of its own: every call takes the site groups, always the same, whose slots nothing else may load.
/// They outlive it.
#[derive(Debug)]
pub struct ExpertMemory {
    experts: HashMap<u32, Expert>,
    /// The expert in each seat.
    seats: Vec<Option<u32>>,
    /// Advances with every use.
    clock: u64,
    copies: Stream,
    /// Behind the steps that may use what was lost.
    steps: Event,
    /// Whether something was lost since `steps` was waited for.
    lost: bool,
    /// Events behind moves whose end has not been seen, the oldest first.
    under_way: VecDeque<(Move, Event)>,
    spare_events: Vec<Event>,
    begun: Move,
    ended: Move,
    /// Removed while their copies were under way.
    leaving: Vec<(Move, StagedExpert)>,
    /// What a seat has at a site that its expert does not change; never written.
    empty: Pinned<SlotChunks>,
    generation: u64,
    bytes: u64,
    /// Scratch of `bring`: chunks that must stay, by site; the experts wanted, each once.
    staying: Vec<usize>,
    distinct: Vec<u32>,
}

/// Moves are counted, and end in the order in which they began. Nothing is number 0.
type Move = u64;

#[derive(Debug)]
struct Expert {
    content: StagedExpert,
    seat: Option<usize>,
    /// The last that it made.
    moved: Move,
    /// When it was used last.
    used: u64,
}

/// What an [`ExpertMemory`] has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExpertStats {
    /// Experts that are known.
    pub staged: usize,
    /// Experts that have a seat, those whose copies are under way included.
    pub resident: usize,
    /// Moves onto the device so far.
    pub moves: u64,
    /// Bytes of these moves.
    pub bytes: u64,
}

impl ExpertMemory {
    /// A memory of arenas with `seats` slots each.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn new(device: &Arc<Device>, seats: usize) -> Result<Self, CudaError> {
        Ok(Self {
            experts: HashMap::new(),
            seats: vec![None; seats],
            clock: 0,
            copies: device.stream()?,
            steps: device.event()?,
            lost: false,
            under_way: VecDeque::with_capacity(seats),
            spare_events: (0..seats).map(|_| device.event()).collect::<Result<_, _>>()?,
            begun: 0,
            ended: 0,
            leaving: Vec::new(),
            empty: Pinned::new(device, 1, "an empty slot")?,
            generation: 0,
            bytes: 0,
            staying: Vec::new(),
            distinct: Vec::new(),
        })
    }

    /// Makes `content` what `expert` is, in place of what it was; then it has no seat. What was laid out on another
    /// thread is taken over here without a copy.
    ///
    /// # Errors
    /// [`CudaError::Shape`] for content laid out for other arenas, [`CudaError::OutOfMemory`] when there is no room for
    /// its columns; the expert is then what it was.
    pub fn insert(
        &mut self,
        groups: &mut [SiteGroup],
        expert: u32,
        content: StagedExpert,
    ) -> Result<(), CudaError> {
        for pair in content.pairs() {
            let arena = self.arena(groups, pair.site)?;
            if *arena.shape() != pair.shape {
                let [group, site] = pair.site;
                return Err(CudaError::Shape(format!(
                    "an adapter laid out for {:?} at site {site} of group {group}, which has {:?}",
                    pair.shape,
                    arena.shape()
                )));
            }
        }
        for pair in content.pairs() {
            self.reserve(groups, pair.site, &pair.layout)?;
        }
        self.remove(groups, expert)?;
        self.experts.insert(expert, Expert { content, seat: None, moved: 0, used: 0 });
        Ok(())
    }

    /// Adds what `expert` changes at a site of a group, in place of what it changed there; then it has no seat. Lays it
    /// out on this thread, after copies of this expert that are under way: what must not hold up steps is made as a
    /// [`StagedExpert`] elsewhere and [inserted](Self::insert).
    ///
    /// # Errors
    /// As [`StagedExpert::add`] and [`insert`](Self::insert); the expert then is what it was, if perhaps without a seat.
    pub fn stage(
        &mut self,
        groups: &mut [SiteGroup],
        expert: u32,
        site: [usize; 2],
        pair: &LowRank<'_>,
    ) -> Result<(), CudaError> {
        let shape = *self.arena(groups, site)?.shape();
        shape.check(pair)?;
        self.reserve(groups, site, &PairLayout::new(&shape, pair))?;
        if self.experts.get(&expert).is_some_and(|expert| expert.seat.is_some()) {
            self.wait(expert)?;
            self.unseat(groups, expert);
        }
        if let Some(known) = self.experts.get_mut(&expert) {
            return known.content.add(site, &shape, pair);
        }
        let mut content = StagedExpert::new(self.copies.device(), pair.order);
        content.add(site, &shape, pair)?;
        self.experts.insert(expert, Expert { content, seat: None, moved: 0, used: 0 });
        Ok(())
    }

    /// Forgets an expert, which no later step may use. One that is not known is none to forget.
    ///
    /// Freeing page-locked memory may make the driver wait for the device.
    pub fn remove(&mut self, groups: &mut [SiteGroup], expert: u32) -> Result<(), CudaError> {
        self.unseat(groups, expert);
        if let Some(expert) = self.experts.remove(&expert)
            && expert.moved > self.ended
        {
            self.leaving.push((expert.moved, expert.content));
        }
        self.poll()?;
        self.leaving.retain(|(moved, _)| *moved > self.ended);
        Ok(())
    }

    /// Sees to it that the experts in `wanted` come to be resident beside those in `kept`, which running sequences use.
    /// Both count as used now. Returns whether all of `wanted` are ready for a step on `stream`, the stream of all steps.
    ///
    /// Where one has no seat, seats and chunks are taken from those used longest ago, and its copies begin; one for which
    /// `kept` and copies under way leave no room is passed over until a later call. Nothing here waits or allocates.
    ///
    /// Steps that are queued from now on use experts of `wanted` and `kept` alone. The stream is not capturing.
    ///
    /// # Errors
    /// [`CudaError::Shape`] for an expert that is not staged; when `kept` is empty, also for more experts than seats, and
    /// [`CudaError::OutOfChunks`] for more chunks than a site has: such a request can never run. Nothing has changed then.
    pub fn bring(
        &mut self,
        groups: &mut [SiteGroup],
        wanted: &[u32],
        kept: &[u32],
        stream: &Stream,
    ) -> Result<bool, CudaError> {
        self.poll()?;
        if let Some(unknown) = wanted.iter().find(|expert| !self.experts.contains_key(expert)) {
            return Err(CudaError::Shape(format!("expert {unknown} is not staged")));
        }
        if wanted.iter().all(|expert| self.experts[expert].seat.is_some()) {
            self.touch(wanted, kept);
            return Ok(wanted.iter().all(|&expert| self.seat(expert).is_some()));
        }
        if kept.is_empty() {
            self.check_fit(groups, wanted)?;
        }
        let before = self.clock;
        self.touch(wanted, kept);
        self.seat_missing(groups, wanted, before, stream)?;
        Ok(false)
    }

    /// Blocks until the copies of a resident expert are done, and it is ready.
    ///
    /// # Errors
    /// [`CudaError::Shape`] for an expert without a seat.
    pub fn wait(&mut self, expert: u32) -> Result<(), CudaError> {
        let Some(Expert { moved, seat: Some(_), .. }) = self.experts.get(&expert) else {
            return Err(CudaError::Shape(format!("expert {expert} has no seat to wait for")));
        };
        let moved = *moved;
        while let Some((_, event)) = self.under_way.front().filter(|(of_event, _)| *of_event <= moved) {
            event.synchronize()?;
            self.end_oldest();
        }
        Ok(())
    }

    /// The slot of an expert that is ready to be used, as far as [`bring`](Self::bring) and [`wait`](Self::wait) have
    /// seen.
    pub fn seat(&self, expert: u32) -> Option<u32> {
        let expert = self.experts.get(&expert)?;
        expert.seat.filter(|_| expert.moved <= self.ended).map(|seat| seat as u32)
    }

    /// The order of an expert: see [`LowRank::order`].
    pub fn order(&self, expert: u32) -> Option<u64> {
        self.experts.get(&expert).map(|expert| expert.content.order())
    }

    /// Changes when a captured graph may no longer serve: products are launched with whether any expert changes columns.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// What it has done so far.
    pub fn stats(&self) -> ExpertStats {
        ExpertStats {
            staged: self.experts.len(),
            resident: self.seats.iter().flatten().count(),
            moves: self.begun,
            bytes: self.bytes,
        }
    }

    fn arena<'a>(
        &self,
        groups: &'a mut [SiteGroup],
        [group, site]: [usize; 2],
    ) -> Result<&'a mut ChunkArena, CudaError> {
        let found = groups.get_mut(group).and_then(|group| group.sites_mut().get_mut(site));
        let Some(found) = found else {
            return Err(CudaError::Shape(format!("no site {site} of group {group}")));
        };
        let slots = found.chunks.shape().slots;
        if slots < self.seats.len() {
            return Err(CudaError::Shape(format!(
                "an arena of {slots} slots for {} seats",
                self.seats.len()
            )));
        }
        Ok(&mut found.chunks)
    }

    /// Room for the columns of a pair.
    fn reserve(
        &mut self,
        groups: &mut [SiteGroup],
        site: [usize; 2],
        layout: &PairLayout,
    ) -> Result<(), CudaError> {
        if self.arena(groups, site)?.reserve_columns(self.copies.device(), layout)? {
            self.generation += 1;
        }
        Ok(())
    }

    /// Sees which moves have ended.
    fn poll(&mut self) -> Result<(), CudaError> {
        while let Some((_, event)) = self.under_way.front()
            && event.is_reached()?
        {
            self.end_oldest();
        }
        Ok(())
    }

    fn end_oldest(&mut self) {
        if let Some((of_event, event)) = self.under_way.pop_front() {
            self.ended = of_event;
            self.spare_events.push(event);
        }
    }

    fn touch(&mut self, wanted: &[u32], kept: &[u32]) {
        for expert in kept.iter().chain(wanted) {
            if let Some(expert) = self.experts.get_mut(expert) {
                self.clock += 1;
                expert.used = self.clock;
            }
        }
    }

    /// Whether `wanted` fit the device together, with nothing else on it.
    fn check_fit(&mut self, groups: &mut [SiteGroup], wanted: &[u32]) -> Result<(), CudaError> {
        self.distinct.clear();
        self.distinct.extend(wanted);
        self.distinct.sort_unstable();
        self.distinct.dedup();
        if self.distinct.len() > self.seats.len() {
            let (experts, seats) = (self.distinct.len(), self.seats.len());
            return Err(CudaError::Shape(format!(
                "{experts} experts at once, on a device with {seats} seats"
            )));
        }
        reset(&mut self.staying, groups);
        for expert in &self.distinct {
            self.experts[expert].add_chunks(&mut self.staying);
        }
        for (group, of_group) in groups.iter().zip(self.staying.chunks_exact(MAX_SITES)) {
            for (site, &wanted) in group.sites().iter().zip(of_group) {
                let available = site.chunks.shape().chunks;
                if wanted > available {
                    return Err(CudaError::OutOfChunks { wanted, available });
                }
            }
        }
        Ok(())
    }

    /// Begins the moves of those in `wanted` that have no seat and fit beside what must stay: experts used after `now`,
    /// and those whose copies are under way.
    fn seat_missing(
        &mut self,
        groups: &mut [SiteGroup],
        wanted: &[u32],
        now: u64,
        stream: &Stream,
    ) -> Result<(), CudaError> {
        reset(&mut self.staying, groups);
        let mut seats_left = self.seats.len();
        for expert in self.seats.iter().flatten() {
            let expert = &self.experts[expert];
            if expert.must_stay(now, self.ended) {
                expert.add_chunks(&mut self.staying);
                seats_left -= 1;
            }
        }
        for number in wanted {
            let expert = &self.experts[number];
            let fits = expert.content.pairs().iter().all(|pair| {
                let [group, site] = pair.site;
                let chunks = groups[group].sites()[site].chunks.shape().chunks;
                self.staying[group * MAX_SITES + site] + pair.layout.chunks <= chunks
            });
            if expert.seat.is_some() || seats_left == 0 || !fits {
                continue;
            }
            let Some(seat) = self.make_room(groups, *number, now) else { continue };
            self.begin(groups, *number, seat, stream)?;
            self.experts[number].add_chunks(&mut self.staying);
            seats_left -= 1;
        }
        Ok(())
    }

    /// A free seat, once there are chunks enough for an expert too. None when nobody is left to take them from: something
    /// else holds chunks of the arenas.
    fn make_room(&mut self, groups: &mut [SiteGroup], expert: u32, now: u64) -> Option<usize> {
        loop {
            let pairs = self.experts[&expert].content.pairs();
            let enough = pairs.iter().all(|pair| {
                let [group, site] = pair.site;
                groups[group].sites()[site].chunks.free_chunks() >= pair.layout.chunks
            });
            if let Some(seat) = self.seats.iter().position(Option::is_none).filter(|_| enough) {
                return Some(seat);
            }
            let others = self.seats.iter().flatten().copied();
            let others = others.filter(|other| !self.experts[other].must_stay(now, self.ended));
            let oldest = others.min_by_key(|other| self.experts[other].used)?;
            self.unseat(groups, oldest);
        }
    }

    /// Takes an expert's seat and chunks, if it has any.
    fn unseat(&mut self, groups: &mut [SiteGroup], expert: u32) {
        let Some(expert) = self.experts.get_mut(&expert) else { return };
        let Some(seat) = expert.seat.take() else { return };
        self.seats[seat] = None;
        self.lost = true;
        for pair in expert.content.pairs() {
            let [group, site] = pair.site;
            groups[group].sites_mut()[site].chunks.give_back(seat);
        }
    }

    /// Queues the copies of an expert into a seat.
    fn begin(
        &mut self,
        groups: &mut [SiteGroup],
        number: u32,
        seat: usize,
        stream: &Stream,
    ) -> Result<(), CudaError> {
        if self.lost {
            stream.record(&self.steps)?;
            self.copies.wait(&self.steps)?;
            self.lost = false;
        }
        let event = match self.spare_events.pop() {
            Some(event) => event,
            None => self.copies.device().event()?,
        };
        let empty = self.empty[..].first_chunk().expect("one entry");
        let expert = self.experts.get_mut(&number).expect("a wanted expert is staged");
        // SAFETY: its copies before these are done, or it would have a seat. It is kept while they are under way, as
        // `leaving` or to the end, where `drop` waits for them; arenas outlive this.
        let queued = unsafe { expert.content.place(groups, seat, &self.copies, empty) };
        let queued = queued.and_then(|bytes| self.copies.record(&event).map(|()| bytes));
        self.seats[seat] = Some(number);
        expert.seat = Some(seat);
        match queued {
            Ok(bytes) => {
                self.begun += 1;
                expert.moved = self.begun;
                self.bytes += bytes as u64;
                self.under_way.push_back((self.begun, event));
                Ok(())
            }
            Err(error) => {
                // With a device that has failed there is nothing to hold up, and copies may be under way.
                let _ = self.copies.synchronize();
                self.unseat(groups, number);
                Err(error)
            }
        }
    }
}

impl Expert {
    fn must_stay(&self, now: u64, ended: Move) -> bool {
        self.used > now || self.moved > ended
    }

    /// Adds its chunks at each site.
    fn add_chunks(&self, sums: &mut [usize]) {
        for pair in self.content.pairs() {
            let [group, site] = pair.site;
            sums[group * MAX_SITES + site] += pair.layout.chunks;
        }
    }
}

impl Drop for ExpertMemory {
    fn drop(&mut self) {
        // The copies read memory that is freed now. An error leaves nobody to hear of it.
        let _ = self.copies.synchronize();
    }
}

/// A zero for every site.
fn reset(sums: &mut Vec<usize>, groups: &[SiteGroup]) {
    sums.clear();
    sums.resize(groups.len() * MAX_SITES, 0);
}
