//! Vectorised scalar functions, and the choice of the instruction set at run time.

/// Defines `fn name(args) -> ret` that runs the generic `body::<FMA>` compiled for the best instruction set this CPU
/// has. `body` must be `#[inline(always)]`, so that it is compiled inside each variant.
macro_rules! dispatch {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:ident) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx512($($arg: $ty),*) $(-> $ret)? {
                    $body::<true>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx2($($arg: $ty),*) $(-> $ret)? {
                    $body::<true>($($arg),*)
                }
                match $crate::ops::simd::level() {
                    // SAFETY: `level` has just said that this CPU has these features.
                    #[allow(unsafe_code)]
                    $crate::ops::simd::Level::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    #[allow(unsafe_code)]
                    $crate::ops::simd::Level::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::ops::simd::Level::Baseline => {}
                }
            }
            $body::<{ cfg!(target_arch = "aarch64") }>($($arg),*)
        }
    };
}
pub(super) use dispatch;

/// What this CPU can run.
pub(super) enum Level {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Baseline,
}

/// The best of [`Level`] on this CPU: what the target always has.
#[cfg(not(target_arch = "x86_64"))]
#[inline]
pub(super) fn level() -> Level {
    Level::Baseline
}

/// The best of [`Level`] on this CPU; std caches the answer.
#[cfg(target_arch = "x86_64")]
#[inline]
pub(super) fn level() -> Level {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    if avx2
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
    {
        Level::Avx512
    } else if avx2 {
        Level::Avx2
    } else {
        Level::Baseline
    }
}

/// Independent partial sums of a reduction: a fixed number, so that a sum does not depend on the instruction set.
pub(super) const LANES: usize = 16;

/// a b + c, fused where the instruction set has it (elsewhere `mul_add` would be a slow library call).
#[inline(always)]
pub(super) fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// e^x to about 1 ulp. Saturates at 2.2e38 above 88.3, is 0 below -87.3; NaN stays NaN.
#[inline(always)]
#[allow(clippy::manual_clamp)] // comparisons that are false for NaN let it through
pub(super) fn exp<const FMA: bool>(x: f32) -> f32 {
    // e^x = 2^n e^r with |r| <= ln 2 / 2; ln 2 in two parts keeps r exact.
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
    let clamped = if x > 88.3 { 88.3 } else { x };
    let clamped = if clamped < -87.3 { -87.3 } else { clamped };
    let shifted = fma::<FMA>(clamped, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = fma::<FMA>(n, -0.693_359_4, clamped);
    let r = fma::<FMA>(n, 2.121_944_4e-4, r);
    // (e^r - 1 - r) / r^2, minimax to 3.4e-9
    let p = fma::<FMA>(1.395_171_9e-3, r, 8.369_599e-3);
    let p = fma::<FMA>(p, r, 4.166_618_7e-2);
    let p = fma::<FMA>(p, r, 0.166_665_12);
    let p = fma::<FMA>(p, r, 0.5);
    let y = fma::<FMA>(p, r * r, r) + 1.0;
    let scale = f32::from_bits(shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23);
    if x < -87.3 { 0.0 } else { y * scale }
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub(super) fn sigmoid<const FMA: bool>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<FMA>(-x))
}

/// The normal distribution's cumulative function (1 + erf(x / sqrt 2)) / 2, to 5e-8.
#[inline(always)]
pub(super) fn normal_cdf<const FMA: bool>(x: f32) -> f32 {
    let a = x.abs();
    let a = if a > 8.0 { 8.0 } else { a };
    // -ln cdf(-a), minimax on [0, 8] weighted for the error of a cdf(-a)
    let p = fma::<FMA>(-7.443_200_5e-10, a, 3.344_521_5e-8);
    let p = fma::<FMA>(p, a, -6.523_020_5e-7);
    let p = fma::<FMA>(p, a, 7.178_494e-6);
    let p = fma::<FMA>(p, a, -4.752_769e-5);
    let p = fma::<FMA>(p, a, 1.689_463_5e-4);
    let p = fma::<FMA>(p, a, 5.981_869e-5);
    let p = fma::<FMA>(p, a, -4.895_580_5e-3);
    let p = fma::<FMA>(p, a, 3.640_819_7e-2);
    let p = fma::<FMA>(p, a, 0.318_286_6);
    let p = fma::<FMA>(p, a, 0.797_887_5);
    let p = fma::<FMA>(p, a, std::f32::consts::LN_2);
    let tail = exp::<FMA>(-p);
    if x < 0.0 { tail } else { 1.0 - tail }
}

/// The normal distribution's density.
#[inline(always)]
pub(super) fn normal_pdf<const FMA: bool>(x: f32) -> f32 {
    0.398_942_3 * exp::<FMA>(-0.5 * x * x)
}

/// The sum of `LANES` partial sums, in a fixed order.
#[inline(always)]
pub(super) fn sum_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        let (lower, upper) = lanes.split_at_mut(width);
        lower.iter_mut().zip(upper).for_each(|(lower, upper)| *lower += *upper);
        width /= 2;
    }
    lanes[0]
}

/// The sum of term(a[i], b[i]); the terms go to [`LANES`] partial sums in turn.
#[inline(always)]
pub(super) fn sum_of_pairs(a: &[f32], b: &[f32], term: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for ((lane, &a), &b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += term(a, b);
        }
    }
    for ((lane, &a), &b) in lanes.iter_mut().zip(a_rest).zip(b_rest) {
        *lane += term(a, b);
    }
    sum_lanes(lanes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<const FMA: bool>() {
        let mut worst = 0.0f64;
        for i in -860_000..880_000 {
            let x = i as f32 * 1e-4;
            let (got, want) = (exp::<FMA>(x) as f64, (x as f64).exp());
            worst = worst.max((got - want).abs() / want);
        }
        assert!(worst < 2e-7, "exp is off by {worst:e}");
        assert_eq!(exp::<FMA>(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp::<FMA>(0.0), 1.0);
        assert!(exp::<FMA>(f32::INFINITY) > 2e38);
        assert!(exp::<FMA>(f32::NAN).is_nan());
        assert!(sigmoid::<FMA>(f32::NAN).is_nan() && normal_cdf::<FMA>(f32::NAN).is_nan());
        assert_eq!(normal_cdf::<FMA>(20.0), 1.0);
        assert!(normal_cdf::<FMA>(-20.0) < 1e-15);
    }

    #[test]
    fn exp_is_accurate_and_keeps_the_edges() {
        check::<true>();
        check::<false>();
    }

    /// cdf(x) as 1/2 plus the integral of the density, by Simpson's rule in f64.
    #[test]
    fn normal_cdf_is_the_integral_of_the_density() {
        let pdf = |x: f64| (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
        let step = 1e-3;
        let mut cdf = 0.5;
        for i in 0..8000 {
            let x = i as f64 * step;
            for (x, want) in [(x, cdf), (-x, 1.0 - cdf)] {
                let got = normal_cdf::<true>(x as f32) as f64;
                assert!((got - want).abs() < 1.2e-7, "cdf({x}) = {got}, not {want}");
                assert!((normal_pdf::<true>(x as f32) as f64 - pdf(x)).abs() < 1e-7);
            }
            cdf += step / 6.0 * (pdf(x) + 4.0 * pdf(x + step / 2.0) + pdf(x + step));
        }
    }
}
