//! BlockLoRA's merge against NumPy.
#![allow(clippy::unwrap_used)]

use blocklora_sdk::testing::{MergeGolden, check_merge};
use merge_blocklora::{Blocklora, Clash, Normalise};

/// Four adapters, which own all, some and no rows of a layer.
#[test]
fn equals_numpy() {
    let golden = MergeGolden::of_the_repository().unwrap();
    let owners = Blocklora { normalise: Normalise::Owners, clash: Clash::Mean };
    let sum1 = Blocklora { normalise: Normalise::Sum1, clash: Clash::Mean };
    check_merge(&golden, "blocklora clash=mean", &owners).unwrap();
    check_merge(&golden, "blocklora clash=mean normalise=sum1", &sum1).unwrap();
    assert!(check_merge(&golden, "blocklora clash=mean", &sum1).is_err());
    assert!(check_merge(&golden, "blocklora clash=mean", &Blocklora::default()).is_err(), "shared rows are refused");
}
