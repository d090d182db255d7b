//! Draws a picture with the daemon and shows how far it is.
//!
//! ```sh
//! cargo run --example generate -- "a cat on the beach" cat.png [session | system | SOCKET]
//! ```

use blocklora_client::{Client, Generate, Place};
use futures_util::StreamExt;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(prompt), Some(file)) = (arguments.next(), arguments.next()) else {
        return Err("usage: generate PROMPT FILE.png [session | system | SOCKET]".into());
    };
    let client = match arguments.next() {
        Some(place) => Client::connect(place.parse()?).await?,
        None => Client::connect_first(&Place::usual()).await.map_err(|errors| format!("no daemon: {errors:?}"))?,
    };

    let job = client.generate(&Generate { formats: vec!["png".into()], ..Generate::new(prompt) }).await?;
    let mut progress = job.progress().await?;
    while let Some(state) = progress.next().await {
        eprintln!("{} {}/{}", state.stage, state.step.0, state.step.1);
    }
    let done = job.wait().await?;
    let pictures = job.take_results(false).await?;
    std::fs::write(&file, &pictures[0].bytes)?;
    println!("{file}: seed {}", done.seeds[0]);
    Ok(())
}
