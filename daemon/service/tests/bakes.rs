//! How the writing of a model ends where nobody reads it: as what it is, and the end that a client gave is as it was.

#![allow(clippy::unwrap_used)]

mod common;

use std::os::fd::AsFd;

use common::{Dict, dict, stub, until};
use rustix::fs::{OFlags, fcntl_getfl};
use rustix::process::{Pid, Signal, kill_process};
use zbus::OwnedObjectPath;

#[tokio::test(flavor = "multi_thread")]
async fn a_bake_that_nobody_reads_times_out_and_is_cut_off_by_the_daemons_end() {
    let daemon = stub::daemon("[daemon]\nstop_timeout_sec = 1\n");
    let client = daemon.client().await;
    let set = client.compose_on(stub::STUB, &[], Dict::new()).await.unwrap();
    let (_reader, writer) = std::io::pipe().unwrap();
    let bake = async |options: Dict| {
        let body = (zbus::Fd::from(writer.as_fd()), options);
        client.call::<_, OwnedObjectPath>(&set, "Composition", "Bake", &body).await.unwrap()
    };
    let job = bake(dict([("timeout_usec", 1_500_000u64.into())])).await;
    until("the writing", || async { fcntl_getfl(&writer).unwrap().contains(OFlags::NONBLOCK) }).await;
    let error = client.wait(job.as_str()).await.unwrap_err();
    assert!(error.starts_with("TimedOut: "), "{error}");
    assert_eq!(client.get::<String>(job.as_str(), "Job", "State").await, "failed");
    assert!(!fcntl_getfl(&writer).unwrap().contains(OFlags::NONBLOCK));
    let job = bake(Dict::new()).await;
    let end = async {
        until("the writing", || async { fcntl_getfl(&writer).unwrap().contains(OFlags::NONBLOCK) }).await;
        kill_process(Pid::from_child(&daemon.child), Signal::TERM).unwrap();
    };
    let (error, ()) = tokio::join!(client.wait(job.as_str()), end);
    let error = error.unwrap_err();
    assert!(error.starts_with("ShuttingDown: "), "{error}");
    assert!(!fcntl_getfl(&writer).unwrap().contains(OFlags::NONBLOCK));
}
