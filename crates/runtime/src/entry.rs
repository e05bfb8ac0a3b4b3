//! From `main` to the exit status.
//!
//! ```text
//!  arguments ─▶ layers ─▶ telemetry ─▶ service runs ─▶ signal or fatal task ─▶ drain ─▶ exit status
//!      │          │                        │                                      │
//!   exit 2     exit 2                   exit 1, one line                 1 if it can't leave in time
//! ```

use std::{
    ffi::OsString, fmt::Write as _, future::Future, path::PathBuf, process::ExitCode, sync::Arc, time::Duration,
};

use clap::{Arg, ArgAction, Command, error::ErrorKind};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{
    Context, Health, Metrics, Process, Shutdown, Tasks, chain,
    config::{Base, Config, Layers, Loaded, LogConfig, ShutdownConfig, TraceConfig, inlined, section},
    telemetry,
};

/// Beyond the grace for requests: to stop servers, leave the cluster, close files.
const LEAVING: Duration = Duration::from_secs(10);

/// For blocking threads (reading files) once everything else has ended.
const BLOCKING: Duration = Duration::from_secs(1);

/// Wrong arguments or configuration.
const USAGE: u8 = 2;

/// A program.
#[derive(Clone, Copy, Debug)]
pub struct Service {
    /// The binary's name.
    pub name: &'static str,
    /// What it does: a sentence, then perhaps paragraphs for `--help`.
    pub about: &'static str,
    /// Its version.
    pub version: &'static str,
}

/// Runs a service from its arguments to its exit status; see the crate's first page.
///
/// `run` gets the configuration and returns once it has drained after [`Context::shutdown`], or with what made it fail.
pub fn main<C, F, Fut>(service: Service, run: F) -> ExitCode
where
    C: Config,
    F: FnOnce(C, Context) -> Fut,
    Fut: Future<Output = anyhow::Result<()>>,
{
    let loaded = match arguments::<C>(&service, std::env::args_os(), std::env::vars_os().collect()) {
        Ok(loaded) => loaded,
        Err(done) => return done.tell(),
    };
    let base = loaded.base();
    let Loaded { config, tree, .. } = loaded;
    let (spans, process) = match telemetry::start(
        &service,
        &section::<LogConfig>(&tree, "log"),
        &section::<TraceConfig>(&tree, "trace"),
    ) {
        Ok(started) => started,
        Err(error) => return Done::Refuse(format!("error: {}", chain(error.as_ref()))).tell(),
    };
    process.set_grace(Duration::from_millis(section::<ShutdownConfig>(&tree, "shutdown").grace_ms));

    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.enable_all().thread_name(service.name);
    if let Some(threads) = section::<Option<usize>>(&tree, "threads") {
        builder.worker_threads(threads.max(1)); // the builder panics on 0
    }
    let end = match builder.build() {
        Ok(runtime) => {
            let end = runtime.block_on(lead(&service, process, base, |context| Box::pin(run(config, context))));
            runtime.shutdown_timeout(BLOCKING);
            end
        }
        Err(error) => Err(anyhow::Error::new(error).context("cannot start threads")),
    };
    drop(spans); // the last ones are sent
    match end {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

/// Runs the service to its end, or to the end of the patience that others have with it.
async fn lead<Fut>(
    service: &Service,
    process: Process,
    base: Base,
    run: impl FnOnce(Context) -> Fut,
) -> anyhow::Result<()>
where
    Fut: Future<Output = anyhow::Result<()>>,
{
    let shutdown = Shutdown::new();
    let context = Context {
        tasks: Tasks::new(service.name, shutdown.clone()),
        shutdown: shutdown.clone(),
        metrics: Metrics::of_process(service),
        health: Health::new(),
        base: Some(Arc::new(base)),
        process: process.clone(),
    };
    let (interrupt, terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    context.tasks.spawn(crate::Kind::Background, "signals", leave_on(interrupt, terminate, shutdown.clone()));

    let running = run(context.clone());
    let overdue = async {
        shutdown.wait().await;
        tokio::time::sleep(process.grace() + LEAVING).await;
    };
    // Whichever comes first ends the process, so nothing is lost by dropping the other.
    let end = tokio::select! {
        end = running => end,
        () = overdue => Err(anyhow::anyhow!("still not done {} ms after the signal to leave", (process.grace() + LEAVING).as_millis())),
    };
    shutdown.trigger();
    if end.is_ok() {
        context.tasks.finish_requests(process.grace()).await; // at once, if the service has waited itself
    }
    // A task that the process can't do without is the reason, whatever the service made of its end.
    match futures_util::FutureExt::now_or_never(context.tasks.fatal()) {
        Some(why) => Err(anyhow::anyhow!(why)),
        None => end,
    }
}

/// The first signal asks everybody to leave; the second one does not wait for them.
async fn leave_on(mut interrupt: Signal, mut terminate: Signal, shutdown: Shutdown) -> anyhow::Result<()> {
    let mut next = async || {
        tokio::select! {
            _ = interrupt.recv() => ("SIGINT", 130), // 128 + the signal's number, as shells report it
            _ = terminate.recv() => ("SIGTERM", 143),
        }
    };
    let (name, _) = next().await;
    tracing::info!(signal = name, "leaving");
    shutdown.trigger();
    let (name, status) = next().await;
    tracing::warn!(signal = name, "asked twice: leaving without waiting");
    #[expect(
        clippy::disallowed_methods,
        reason = "a person insists; whatever still runs is what they do not want to wait for"
    )]
    std::process::exit(status)
}

/// Why there is nothing to run.
#[derive(Debug)]
enum Done {
    /// `--help`, `--version`, `--print-config`: this text, and a good end.
    Print(String),
    /// One line, exit 2.
    Refuse(String),
}

impl Done {
    fn tell(self) -> ExitCode {
        match self {
            Self::Print(text) => {
                use std::io::Write as _;
                // A reader that has seen enough (`| head`) closes the pipe; that is no failure of ours.
                let _ = writeln!(std::io::stdout(), "{}", text.trim_end());
                ExitCode::SUCCESS
            }
            Self::Refuse(line) => {
                eprintln!("error: {line}");
                ExitCode::from(USAGE)
            }
        }
    }
}

fn arguments<C: Config>(
    service: &Service,
    arguments: impl IntoIterator<Item = OsString>,
    env: Vec<(OsString, OsString)>,
) -> Result<Loaded<C>, Done> {
    let matches = command::<C>(service).try_get_matches_from(arguments).map_err(|error| match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => Done::Print(error.to_string()),
        _ => {
            let text = error.to_string();
            let line = text.lines().next().unwrap_or_default();
            Done::Refuse(format!("{} (see --help)", line.trim_start_matches("error: ")))
        }
    })?;
    let file = matches.get_one::<PathBuf>("config").cloned();
    let flags =
        C::FLAGS.iter().filter_map(|(flag, key, _)| Some(format!("{key}={}", matches.get_one::<String>(flag)?)));
    let set = flags.chain(matches.get_many::<String>("set").into_iter().flatten().cloned()).collect();
    // What is not UTF-8 can't be ours: keys and values are.
    let env = env
        .into_iter()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect();
    let loaded =
        Layers { file: file.as_deref(), env, set }.load::<C>().map_err(|error| Done::Refuse(error.to_string()))?;
    if matches.get_flag("print-config") {
        let yaml = serde_yaml_ng::to_string(&loaded.tree).map_err(|error| Done::Refuse(error.to_string()))?;
        return Err(Done::Print(yaml));
    }
    Ok(loaded)
}

fn command<C: Config>(service: &Service) -> Command {
    Command::new(service.name)
        .version(service.version)
        .about(service.about.lines().next().unwrap_or_default())
        .long_about(service.about)
        .after_long_help(keys::<C>())
        .after_help("Keys of the configuration: --help")
        .arg(
            Arg::new("config")
                .long("config")
                .value_name("FILE")
                .value_parser(clap::value_parser!(PathBuf))
                .help("Configuration in YAML; what it does not name keeps its default"),
        )
        .arg(
            Arg::new("set")
                .long("set")
                .value_name("KEY=VALUE")
                .action(ArgAction::Append)
                .help("Sets one key, over file and environment; may be repeated"),
        )
        .arg(
            Arg::new("print-config")
                .long("print-config")
                .action(ArgAction::SetTrue)
                .help("Prints the configuration that results, as YAML, and exits"),
        )
        .args(C::FLAGS.iter().map(|(flag, key, help)| {
            Arg::new(*flag).long(*flag).value_name("VALUE").help(format!("{help}; the same as --set {key}="))
        }))
}

/// The list of keys with their defaults.
fn keys<C: Config>() -> String {
    let keys = inlined(&serde_yaml_ng::to_value(C::default()).unwrap_or_default());
    let width = keys.iter().map(|(key, _)| key.len()).max().unwrap_or_default();
    let mut text =
        "Keys and defaults (in a file as sections; as a variable: KVASIR_LOG__FILTER for log.filter):\n".to_owned();
    for (key, default) in keys {
        let _ = writeln!(text, "  {key:width$}  {default}");
    }
    if !C::LIVE.is_empty() {
        let _ = writeln!(text, "\nMay be changed while it runs (kvasirctl config set):");
        for (key, when) in C::LIVE {
            let _ = writeln!(text, "  {key:width$}  {when}");
        }
    }
    text
}

#[cfg(test)]
mod tests;
