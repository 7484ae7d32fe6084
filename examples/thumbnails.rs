//! A thumbnail service: pictures in, small JPEGs out, one process a core.
//!
//! It starts its server as a child process, renders pictures for it, sends them all at once through `Call`, saves the
//! thumbnails, and drains the server. A file that is no picture is one item's error; nothing else notices.
//!
//!     cargo run --release --example thumbnails -- [FOLDER]

use std::{
    env, fs,
    io::{BufRead as _, BufReader, Cursor},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use clap::Parser;
use forkring::{
    Code, Failure, Item, Pool, Reply, Server,
    client::Client,
    proto::v1::{Status, WorkItem, WorkResult},
};
use image::{DynamicImage, ImageFormat, ImageReader, Rgb, RgbImage, codecs::jpeg::JpegEncoder};
use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};
use tokio::task::JoinSet;

/// Makes thumbnails of pictures that it renders.
#[derive(Parser)]
struct Options {
    /// Where to save them [default: a new folder in the system's temporary one]
    folder: Option<PathBuf>,

    /// How many pictures
    #[arg(long, default_value_t = 24)]
    pictures: u32,

    /// Pixels from left to right of a picture
    #[arg(long, default_value_t = 1600)]
    width: u32,

    /// Be the server
    #[arg(long, hide = true)]
    serve: bool,
}

/// The handler: decodes the picture from where it lies in shared memory, and writes the thumbnail to where it is sent
/// from.
fn thumbnail(item: &Item<'_>, reply: &mut Reply<'_, '_>) -> Result<(), Failure> {
    let edge = item.metadata("edge").unwrap_or("256");
    let edge = edge.parse().ok().filter(|edge| (1..=4096).contains(edge));
    let edge = edge.ok_or_else(|| Failure::new(Code::InvalidArgument, "BAD_EDGE", "edge must be 1 to 4096 pixels"))?;

    let bad = |error| Failure::new(Code::InvalidArgument, "BAD_PICTURE", error);
    // The decoder's default limits stop a small file from becoming a huge picture.
    let picture = ImageReader::new(Cursor::new(item.payload())).with_guessed_format()?.decode().map_err(bad)?;
    picture.thumbnail(edge, edge).into_rgb8().write_with_encoder(JpegEncoder::new_with_quality(reply, 80))?;
    Ok(())
}

/// The server: all there is to it.
fn serve() -> anyhow::Result<()> {
    // It is not to outlive the example.
    set_parent_process_death_signal(Some(Signal::TERM))?;
    let server = Server::new()
        .name(format!("thumbnails-{}", std::process::id()))
        .listen(([127, 0, 0, 1], 0).into())
        .pool(Pool::new("thumbnails", thumbnail))
        .bind()?;
    println!("listening on {}", server.local_addr());
    Ok(server.run()?)
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    if options.serve {
        return serve();
    }
    let folder = match options.folder {
        Some(folder) => folder,
        None => tempfile::Builder::new().prefix("thumbnails-").tempdir()?.keep(),
    };
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;

    let (mut server, address) = start()?;
    let mut pictures = (0..options.pictures).map(|n| render(n, options.width)).collect::<Result<Vec<_>, _>>()?;
    pictures.push(("notes.txt".to_owned(), b"not a picture".to_vec()));
    // The connection ends with the runtime.
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(send(&address, pictures, &folder))?;

    kill_process(Pid::from_child(&server), Signal::TERM)?;
    ensure!(server.wait()?.success(), "the server did not drain");
    println!("the thumbnails are in {}", folder.display());
    Ok(())
}

/// Starts this program once more as the server; where it listens.
fn start() -> anyhow::Result<(Child, String)> {
    let mut server = Command::new(env::current_exe()?).arg("--serve").stdout(Stdio::piped()).spawn()?;
    let mut line = String::new();
    BufReader::new(server.stdout.take().context("its stdout is a pipe")?).read_line(&mut line)?;
    let address = line.trim_end().strip_prefix("listening on ").context("the server did not start")?;
    Ok((server, address.to_owned()))
}

/// Sends all pictures at once and saves what comes back.
async fn send(address: &str, pictures: Vec<(String, Vec<u8>)>, folder: &Path) -> anyhow::Result<()> {
    let client = Client::connect(address).await?;
    let bytes: usize = pictures.iter().map(|(_, picture)| picture.len()).sum();
    let (began, count) = (Instant::now(), pictures.len());
    let mut calls = JoinSet::new();
    for (name, picture) in pictures {
        let client = client.clone();
        calls.spawn(async move {
            let size = picture.len();
            let answer = client.call(WorkItem::new("thumbnails", picture).with_metadata("edge", "200")).await;
            (name, size, answer)
        });
    }
    let mut worked = Duration::ZERO;
    while let Some(done) = calls.join_next().await {
        let (name, size, answer) = done?;
        match answer {
            Ok(result) => {
                worked += save(&folder.join(&name).with_extension("thumbnail.jpg"), &name, size, &result)?;
            }
            Err(status) => println!("{name:>18}  {}", Status::from(&status)),
        }
    }
    let took = began.elapsed();
    let rate = bytes as f64 / took.as_secs_f64() / 1e6;
    println!("{count} files in {took:.1?} ({rate:.1} MB/s) for {worked:.1?} of work");
    Ok(())
}

/// Saves a thumbnail; how long the work on it took.
fn save(path: &Path, name: &str, size: usize, result: &WorkResult) -> anyhow::Result<Duration> {
    fs::write(path, &result.payload).with_context(|| format!("cannot write {}", path.display()))?;
    let timing = result.timing.unwrap_or_default();
    let (queued, worked) = (Duration::from_nanos(timing.queued_ns), Duration::from_nanos(timing.worked_ns));
    let to = result.payload.len();
    println!("{name:>18}  {size:>8} → {to:>6} bytes, queued {queued:.1?}, worked {worked:.1?} in {}", result.worker);
    Ok(worked)
}

/// A picture with detail in it: parts of the Mandelbrot set as JPEG, waves as PNG.
fn render(n: u32, width: u32) -> anyhow::Result<(String, Vec<u8>)> {
    let (name, format) = match n % 2 {
        0 => (format!("mandelbrot-{n:02}.jpg"), ImageFormat::Jpeg),
        _ => (format!("waves-{n:02}.png"), ImageFormat::Png),
    };
    let zoom = 3.0 * 0.7_f64.powf(n.into());
    let picture = RgbImage::from_fn(width, (width * 3 / 4).max(1), |x, y| {
        let [x, y] = [x, y].map(|at| f64::from(at) / f64::from(width) - 0.5);
        let hue = match format {
            ImageFormat::Jpeg => escape(x * zoom - 0.743_643, y * zoom + 0.131_825),
            _ => ((x * 40.0).sin() + (y * f64::from(n)).cos() + (x * y * 90.0).sin()) * 3.0,
        };
        Rgb([0.0, 2.1, 4.2].map(|phase| ((hue * 0.4 + phase).sin().mul_add(0.5, 0.5) * 255.0) as u8))
    });
    let mut file = Cursor::new(Vec::new());
    DynamicImage::from(picture).write_to(&mut file, format)?;
    Ok((name, file.into_inner()))
}

/// How soon a point leaves the Mandelbrot set.
fn escape(re: f64, im: f64) -> f64 {
    let (mut x, mut y) = (0.0, 0.0);
    let steps = (0..150).take_while(|_| {
        (x, y) = (x * x - y * y + re, 2.0 * x * y + im);
        x * x + y * y < 4.0
    });
    steps.count() as f64
}
