/// What BLOCKLORA_HOSTILE says, or the file whose name stands there behind an `@`.
fn current_mode() -> String {
    let mode = std::env::var("BLOCKLORA_HOSTILE").unwrap_or_default();
    match mode.strip_prefix('@') {
        Some(file) => std::fs::read_to_string(file).unwrap_or_default(),
        None => mode,
    }
}

/// Whether that is `name`.
fn mode(name: &str) -> bool {
    current_mode() == name
}

/// Runs when the library is loaded, before anything of it is called.
#[used]
#[allow(unsafe_code)]
#[unsafe(link_section = ".init_array")]
static LOADED: extern "C" fn() = {
    extern "C" fn loaded() {
        misbehave("load");
    }
    loaded
};

/// Hands over two artefacts, one of them twice, where that is what the mode says; this is no misdeed.
fn hand_over(job: &(impl blocklora_sdk::Job + ?Sized), place: &str) -> blocklora_sdk::Result<()> {
    if mode("artefacts") {
        job.artefact(&format!("{place}.txt"), b"a draft")?;
        job.artefact(&format!("{place}.txt"), place.as_bytes())?;
        job.artefact("bytes.bin", &[0, 255, 10])?;
    }
    if mode("artefact-outside") {
        job.artefact("../outside", b"")?;
    }
    Ok(())
}

/// Does what `<what>-<place>` names: panics, crashes, hangs, takes all memory, ends the process.
fn misbehave(place: &str) {
    let is = |what: &str| mode(&format!("{what}-{place}"));
    if is("panic") {
        panic!("no {place} today");
    }
    if is("segfault") {
        #[allow(unsafe_code)]
        // SAFETY: none. This is what a plugin must survive without its host.
        unsafe {
            std::ptr::without_provenance_mut::<u8>(16).write_volatile(1);
        }
    }
    if is("abort") {
        std::process::abort();
    }
    if is("exit") {
        std::process::exit(0);
    }
    while is("hang") {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    if is("allocate") {
        let mut kept: Vec<Vec<u8>> = Vec::new();
        loop {
            kept.push(vec![1; 16 << 20]);
        }
    }
}
