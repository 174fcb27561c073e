//! The engine: many requests, one ragged batch per step.
//!
//! [`Engine::start`] opens a thread that owns the backend. Requests are queued with [`Engine::submit`], which returns
//! a [`Stream`] of events; adapters come and go with [`Engine::load_adapter`] and [`Engine::unload_adapter`] while
//! requests run.

mod options;
mod pages;
pub mod request;
mod scheduler;
mod sequence;
mod stop;
mod stream;
mod worker;

use std::any::Any;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crate::adapter::peft::{AdapterError, Limits, read_adapter, validate_adapter_name};
use crate::adapter::{Adapter, StoreError};
use crate::backend::cpu::Cpu;
#[cfg(feature = "cuda")]
use crate::backend::cuda::{Cuda, Element};
use crate::backend::{Backend, BackendError};
use crate::mixture::MixtureError;
use crate::model::{AdapterLoader, Base, BaseError, ModelError};
use request::{Event, Request};
use worker::Worker;

pub use options::{Device, EngineOptions};
pub use stream::Stream;

/// What the engine can fail with.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error(transparent)]
    Base(#[from] BaseError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Mixture(#[from] MixtureError),
    #[error(transparent)]
    Backend(#[from] BackendError),
    #[error("`{option}` is {found}; wanted {wanted}")]
    Option { option: &'static str, found: String, wanted: String },
    #[error("`{field}` is {found}; wanted {wanted}")]
    Request { field: &'static str, found: String, wanted: String },
    #[error("this build is without CUDA: build again with the feature `cuda`")]
    WithoutCuda,
    #[error("the request failed: {0}")]
    Failed(String),
    #[error("the engine has stopped")]
    Stopped,
}

/// Counters of a running engine.
#[derive(Debug, Default)]
pub struct Stats {
    steps: AtomicU64,
    rows: AtomicU64,
    generated: AtomicU64,
    running: AtomicUsize,
    waiting: AtomicUsize,
    cache_permille: AtomicUsize,
}

impl Stats {
    /// Steps computed.
    pub fn steps(&self) -> u64 {
        self.steps.load(Ordering::Relaxed)
    }

    /// Rows computed: tokens of prompts and of outputs.
    pub fn rows(&self) -> u64 {
        self.rows.load(Ordering::Relaxed)
    }

    /// Tokens generated.
    pub fn generated(&self) -> u64 {
        self.generated.load(Ordering::Relaxed)
    }

    /// Sequences in the last step's batch.
    pub fn running(&self) -> usize {
        self.running.load(Ordering::Relaxed)
    }

    /// Sequences that waited to join it.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Share of the KV cache in use at the last step, 0 to 1.
    pub fn kv_cache_usage(&self) -> f64 {
        self.cache_permille.load(Ordering::Relaxed) as f64 / 1000.0
    }
}

/// A resident adapter, as [`Engine::adapters`] lists it.
#[derive(Clone, Debug)]
pub struct AdapterCard {
    pub name: String,
    /// The folder it was read from, where it was.
    pub root: Option<PathBuf>,
    /// SHA-256 of its content: its identity.
    pub hash: String,
    /// How many sites have a low-rank pair, and the largest rank among them.
    pub sites: usize,
    pub max_rank: usize,
}

impl AdapterCard {
    fn new(name: &str, root: Option<&Path>, adapter: &Adapter) -> Self {
        Self {
            name: name.to_owned(),
            root: root.map(Path::to_owned),
            hash: adapter.hash.clone(),
            sites: adapter.sites.len(),
            max_rank: adapter.sites.iter().map(|site| site.rank).max().unwrap_or(0),
        }
    }
}

/// An adapter as the engine's backend takes it.
struct LaidOut {
    /// The backend's `Expert`: the engine does not know its backend by type.
    expert: Box<dyn Any + Send>,
    /// Whether it may be one of several.
    mixable: bool,
}

/// Lays adapters out on the thread that brings them, so that no step waits for that.
type LayOut = Box<dyn Fn(&Adapter) -> Result<LaidOut, EngineError> + Send + Sync>;

enum Command {
    Submit { request: Arc<Request>, events: Sender<Event>, cancelled: Arc<AtomicBool> },
    Load { name: String, adapter: LaidOut, reply: Sender<Result<(), EngineError>> },
    Unload { name: String, reply: Sender<Result<(), EngineError>> },
}

/// A running engine. Dropping it stops its thread; requests that still run are aborted.
pub struct Engine {
    base: Arc<Base>,
    options: EngineOptions,
    max_model_len: usize,
    lay_out: LayOut,
    commands: Option<Sender<Command>>,
    thread: Option<JoinHandle<()>>,
    stats: Arc<Stats>,
    adapters: Mutex<Vec<AdapterCard>>,
}

impl Engine {
    /// Starts an engine for `base` on a thread of its own.
    ///
    /// # Errors
    /// When an option is out of range or the backend has no room.
    pub fn start(base: Arc<Base>, options: EngineOptions) -> Result<Self, EngineError> {
        options.check(&base.config)?;
        match options.device {
            Device::Cpu => {
                let threads = options.threads;
                Self::start_on(base, options, move || Cpu::new(threads))
            }
            #[cfg(feature = "cuda")]
            Device::Cuda(ordinal) => {
                let memory = options.cuda_memory();
                // Nobody waits for a seat that is not there.
                let options = EngineOptions { max_loras: Some(memory.seats), ..options };
                let element = Element::from_dtype(options.gpu_dtype(&base.checkpoint));
                let element = element.expect("the options allow no other type");
                Self::start_on(base, options, move || Cuda::open(ordinal, memory, element))
            }
            #[cfg(not(feature = "cuda"))]
            Device::Cuda(_) => Err(EngineError::WithoutCuda),
        }
    }

    /// Starts an engine on a backend of its own making, which its thread owns.
    ///
    /// # Errors
    /// As [`start`](Self::start), and those of `open`.
    pub fn start_on<B: Backend>(
        base: Arc<Base>,
        options: EngineOptions,
        open: impl FnOnce() -> Result<B, BackendError> + Send + 'static,
    ) -> Result<Self, EngineError> {
        options.check(&base.config)?;
        let stats = Arc::new(Stats::default());
        let (commands, inbox) = channel();
        let (ready, started) = channel();
        let thread = std::thread::Builder::new()
            .name("loramux-engine".to_owned())
            .spawn({
                let (base, options, stats) = (Arc::clone(&base), options.clone(), Arc::clone(&stats));
                move || {
                    let built = open().map_err(EngineError::from).and_then(|mut backend| {
                        let worker = Worker::new(&mut backend, &base, &options, stats)?;
                        Ok((backend, worker))
                    });
                    let (mut backend, mut worker) = match built {
                        Ok(built) => built,
                        Err(error) => return drop(ready.send(Err(error))),
                    };
                    let lay_out = match worker.loader(&backend) {
                        Ok(loader) => lay_out_by(loader, base),
                        Err(error) => return drop(ready.send(Err(error.into()))),
                    };
                    if ready.send(Ok((worker.max_model_len(), lay_out))).is_ok() {
                        backend.scope(move |backend| run(&mut worker, backend, &inbox));
                    }
                }
            })
            .map_err(|error| BackendError::Threads(error.to_string()))?;
        let (max_model_len, lay_out) = started.recv().map_err(|_| EngineError::Stopped)??;
        Ok(Self {
            base,
            options,
            max_model_len,
            lay_out,
            commands: Some(commands),
            thread: Some(thread),
            stats,
            adapters: Mutex::default(),
        })
    }

    pub fn base(&self) -> &Arc<Base> {
        &self.base
    }

    pub fn options(&self) -> &EngineOptions {
        &self.options
    }

    /// Most tokens of a prompt and its continuation together.
    pub fn max_model_len(&self) -> usize {
        self.max_model_len
    }

    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Reads a PEFT folder and makes it resident under `name`. Blocks until it can be used; requests go on meanwhile.
    ///
    /// # Errors
    /// When the name is not allowed or taken, or the folder is refused; the message names file and field.
    pub fn load_adapter(&self, name: &str, folder: &Path) -> Result<AdapterCard, EngineError> {
        validate_adapter_name(name, &self.base.name)?;
        let limits = Limits { max_rank: self.options.max_lora_rank };
        let adapter =
            read_adapter(folder, &self.base.checkpoint.sites().table, &self.base.checkpoint, limits)?;
        self.insert(name, Some(folder), adapter)
    }

    /// Makes an adapter from memory resident under `name`.
    ///
    /// # Errors
    /// When the name is not allowed or taken.
    pub fn insert_adapter(&self, name: &str, adapter: Adapter) -> Result<AdapterCard, EngineError> {
        validate_adapter_name(name, &self.base.name)?;
        self.insert(name, None, adapter)
    }

    fn insert(&self, name: &str, root: Option<&Path>, adapter: Adapter) -> Result<AdapterCard, EngineError> {
        let card = AdapterCard::new(name, root, &adapter);
        let (reply, answer) = channel();
        let adapter = (self.lay_out)(&adapter)?;
        self.send(Command::Load { name: name.to_owned(), adapter, reply })?;
        answer.recv().map_err(|_| EngineError::Stopped)??;
        self.lock_adapters().push(card.clone());
        Ok(card)
    }

    /// Takes an adapter's name away. Requests that use it run on to their end.
    ///
    /// # Errors
    /// When there is no such adapter.
    pub fn unload_adapter(&self, name: &str) -> Result<(), EngineError> {
        let (reply, answer) = channel();
        self.send(Command::Unload { name: name.to_owned(), reply })?;
        answer.recv().map_err(|_| EngineError::Stopped)??;
        self.lock_adapters().retain(|card| card.name != name);
        Ok(())
    }

    /// Resident adapters in the order they came.
    pub fn adapters(&self) -> Vec<AdapterCard> {
        self.lock_adapters().clone()
    }

    /// Whether an adapter is resident under this name.
    pub fn has_adapter(&self, name: &str) -> bool {
        self.lock_adapters().iter().any(|card| card.name == name)
    }

    fn lock_adapters(&self) -> std::sync::MutexGuard<'_, Vec<AdapterCard>> {
        self.adapters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a request.
    ///
    /// # Errors
    /// When a field is out of range. An unknown adapter is reported through the stream.
    pub fn submit(&self, request: Request) -> Result<Stream, EngineError> {
        options::check_request(&request, self.base.config.vocab_size, self.max_model_len)?;
        let request = Arc::new(request);
        let (events, inbox) = channel();
        let cancelled = Arc::new(AtomicBool::new(false));
        let stream = Stream::new(Arc::clone(&request), inbox, Arc::clone(&cancelled));
        self.send(Command::Submit { request, events, cancelled })?;
        Ok(stream)
    }

    fn send(&self, command: Command) -> Result<(), EngineError> {
        let commands = self.commands.as_ref().ok_or(EngineError::Stopped)?;
        commands.send(command).map_err(|_| EngineError::Stopped)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.commands = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported there already.
            thread.join().ok();
        }
    }
}

fn lay_out_by<B: Backend>(loader: AdapterLoader<B>, base: Arc<Base>) -> LayOut {
    Box::new(move |adapter| {
        let expert = Box::new(loader.lay_out(adapter, &base.checkpoint)?);
        Ok(LaidOut { expert, mixable: adapter.saved_modules.is_empty() })
    })
}

/// The engine's thread: obey all commands that have come, then compute a step; sleep when there is nothing to do.
fn run<B: Backend>(worker: &mut Worker<B>, backend: &mut B, inbox: &Receiver<Command>) {
    loop {
        if worker.is_idle() {
            match inbox.recv() {
                Ok(command) => obey(worker, backend, command),
                Err(_) => return,
            }
        }
        loop {
            match inbox.try_recv() {
                Ok(command) => obey(worker, backend, command),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return,
            }
        }
        worker.step(backend);
    }
}

fn obey<B: Backend>(worker: &mut Worker<B>, backend: &mut B, command: Command) {
    // A caller that stopped waiting for the reply does not need it.
    match command {
        Command::Submit { request, events, cancelled } => worker.submit(&request, &events, &cancelled),
        Command::Load { name, adapter, reply } => {
            reply.send(worker.load_adapter(backend, &name, adapter)).ok();
        }
        Command::Unload { name, reply } => {
            reply.send(worker.unload_adapter(backend, &name)).ok();
        }
    }
}
