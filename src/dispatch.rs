//! `roomwarden dispatch`: asks LiveKit for daemons in a room, with settings for that room, or takes
//! that back.

use std::{
    io::{self, Write},
    time::{Duration, Instant},
};

use clap::Args;
use serde_json::json;

use crate::{
    cli::{ConfigArgs, EXIT_CHECK, EXIT_OK, EXIT_UNACKNOWLEDGED, EXIT_USAGE},
    config::{Config, JobKind, LiveKitConfig, LogFormat},
    overrides::Overrides,
    room::api::{ApiError, RoomApi},
    usage::{self, Failed},
};

/// How often it is looked whether somebody has taken the job.
const LOOK_EVERY: Duration = Duration::from_millis(250);

#[derive(Args)]
pub(crate) struct DispatchArgs {
    /// The room; it is made if there is none
    room: String,
    /// Settings for the room, as JSON: model, language, encoding, interim_results, punctuate,
    /// smart_format, diarize, keyterm, transcripts_to_room
    #[arg(long, value_name = "JSON", conflicts_with_all = ["model", "language"])]
    metadata: Option<String>,
    /// Model of the room's streams
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// Spoken language of the room
    #[arg(long, value_name = "NAME")]
    language: Option<String>,
    /// Take back what was dispatched by that name, which ends the jobs
    #[arg(long, conflicts_with_all = ["metadata", "model", "language"])]
    cancel: bool,
    /// How long a daemon may take to take the job, in seconds; 0 to not wait for it
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(..=600))]
    wait: u64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    config: ConfigArgs,
}

/// The exit code.
pub(crate) async fn dispatch(args: DispatchArgs, format: Option<LogFormat>) -> u8 {
    usage::done(run(args, format).await)
}

async fn run(args: DispatchArgs, format: Option<LogFormat>) -> Result<u8, Failed> {
    let config = usage::load(&args.config, format)?;
    let api = api(&config)?;
    let name = config.agent.name.clone().unwrap_or_default();
    if args.cancel {
        return cancel(&api, &args, &name).await;
    }
    let overrides = match &args.metadata {
        Some(metadata) => Overrides::parse(metadata),
        None => Overrides::parse(
            &Overrides {
                model: args.model.clone(),
                language: args.language.clone(),
                ..Overrides::default()
            }
            .to_metadata(),
        ),
    };
    let overrides = overrides.map_err(|said| Failed(EXIT_USAGE, said))?;
    let metadata = overrides.to_metadata();
    let made = api.create_dispatch(&args.room, &name, &metadata).await;
    let made = made.map_err(unreachable)?;
    let until = Instant::now() + Duration::from_secs(args.wait);
    // Of other kinds there is none before there is a participant.
    let wait = args.wait > 0 && config.agent.job_type == JobKind::Room;
    let mut taken_by = None;
    while wait && taken_by.is_none() && Instant::now() < until {
        tokio::time::sleep(LOOK_EVERY).await;
        let dispatches = api.list_dispatches(&args.room).await.map_err(unreachable)?;
        let dispatch = dispatches.into_iter().find(|d| d.id == made.id);
        let mut jobs = dispatch
            .and_then(|d| d.state)
            .unwrap_or_default()
            .jobs
            .into_iter();
        taken_by = jobs.find_map(|job| Some((job.id, job.state?.participant_identity)));
    }
    let mut out = io::stdout().lock();
    if args.json {
        let (job, identity) = taken_by.clone().unzip();
        let said = json!({"room": args.room, "agent_name": name, "dispatch": made.id, "job": job,
            "identity": identity, "metadata": made.metadata});
        writeln!(out, "{said}")?;
    } else {
        writeln!(out, "{}: dispatch {}", args.room, made.id)?;
        if let Some((job, identity)) = &taken_by {
            writeln!(out, "job {job} was taken; {identity} joins")?;
        }
    }
    if wait && taken_by.is_none() {
        let by = match name.as_str() {
            "" => "without agent.name".to_owned(),
            name => format!("with agent.name = {name:?}"),
        };
        let said = format!(
            "nobody took the job within {} s: is a daemon running with agent.enabled = true, {by}, \
             and a free slot? One that comes later takes the room up as soon as somebody is in it",
            args.wait
        );
        return Err(Failed(EXIT_UNACKNOWLEDGED, said));
    }
    Ok(EXIT_OK)
}

async fn cancel(api: &RoomApi, args: &DispatchArgs, name: &str) -> Result<u8, Failed> {
    let rooms = api
        .list_rooms(std::slice::from_ref(&args.room))
        .await
        .map_err(unreachable)?;
    let dispatches = match rooms.is_empty() {
        true => Vec::new(),
        false => api.list_dispatches(&args.room).await.map_err(unreachable)?,
    };
    let mut deleted = Vec::new();
    for dispatch in dispatches.into_iter().filter(|d| d.agent_name == name) {
        if api
            .delete_dispatch(&args.room, &dispatch.id)
            .await
            .map_err(unreachable)?
        {
            deleted.push(dispatch.id);
        }
    }
    let mut out = io::stdout().lock();
    if args.json {
        let said = json!({"room": args.room, "agent_name": name, "deleted": deleted});
        writeln!(out, "{said}")?;
    } else if deleted.is_empty() {
        writeln!(out, "{}: no dispatch to take back", args.room)?;
    } else {
        writeln!(out, "{}: took back {}", args.room, deleted.join(", "))?;
    }
    Ok(EXIT_OK)
}

/// LiveKit's API, for which its keys are needed and no others.
pub(crate) fn api(config: &Config) -> Result<RoomApi, Failed> {
    use secrecy::ExposeSecret;

    let LiveKitConfig {
        api_key,
        api_secret,
        ..
    } = &config.livekit;
    for (key, value, variable) in [
        ("livekit.api_key", api_key.as_str(), "LIVEKIT_API_KEY"),
        (
            "livekit.api_secret",
            api_secret.expose_secret(),
            "LIVEKIT_API_SECRET",
        ),
    ] {
        if value.is_empty() {
            return Err(Failed(
                EXIT_USAGE,
                format!("{key} is not set: set {variable}"),
            ));
        }
    }
    Ok(RoomApi::new(&config.livekit))
}

pub(crate) fn unreachable(error: ApiError) -> Failed {
    let code = match error {
        ApiError::Credentials { .. } | ApiError::Argument { .. } => EXIT_USAGE,
        ApiError::Other { .. } => EXIT_CHECK,
    };
    Failed(code, error.to_string())
}
