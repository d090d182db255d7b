//! A first pass over untrusted JSON: no key twice, no deep nesting. serde's own readers keep the last of two equal
//! keys, and two readers that keep different ones would see different adapters in one file.

use std::cell::RefCell;
use std::collections::HashSet;
use std::fmt;
use std::path::Path;

use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};

use crate::error::{Error, Result, excerpt, shortened};

/// Fails unless `text` is one JSON value, nested at most `depth_max` deep, without a key that occurs twice in one
/// object. `part` ("header" or "manifest") goes into the error. Allocates no more than a small multiple of `text`.
pub(crate) fn check(path: &Path, part: &'static str, text: &[u8], depth_max: usize) -> Result<()> {
    let fault = RefCell::new(None);
    let mut reader = serde_json::Deserializer::from_slice(text);
    let seed = Check { above: None, key: "", left: depth_max, fault: &fault };
    let outcome = seed.deserialize(&mut reader).and_then(|()| reader.end());
    match (outcome, fault.into_inner()) {
        (Ok(()), _) => Ok(()),
        (Err(_), Some(Fault::Duplicate(key))) => {
            Err(Error::DuplicateKey { path: path.into(), part, key: shortened(&key) })
        }
        (Err(_), Some(Fault::Deep)) => Err(Error::TooDeep { path: path.into(), part, limit: depth_max }),
        (Err(e), None) => {
            Err(Error::Json { path: path.into(), part, reason: excerpt(&format!("not valid JSON: {e}")) })
        }
    }
}

enum Fault {
    Duplicate(String),
    Deep,
}

/// One value: the key it has, the seed of the object it is in, and how much deeper it may go.
#[derive(Clone, Copy)]
struct Check<'a> {
    above: Option<&'a Check<'a>>,
    key: &'a str,
    left: usize,
    fault: &'a RefCell<Option<Fault>>,
}

impl<'a> Check<'a> {
    fn below<'b>(&'b self, key: &'b str) -> Check<'b> {
        Check { above: Some(self), key, left: self.left - 1, fault: self.fault }
    }

    fn path(&self) -> String {
        match self.above {
            Some(above) if above.above.is_some() => format!("{}.{}", above.path(), self.key),
            _ => self.key.to_owned(),
        }
    }

    fn fail<E: serde::de::Error>(&self, fault: Fault) -> E {
        *self.fault.borrow_mut() = Some(fault);
        E::custom("")
    }
}

impl<'de> DeserializeSeed<'de> for Check<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Check<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }
    fn visit_unit<E>(self) -> std::result::Result<(), E> {
        Ok(())
    }
    fn visit_bool<E>(self, _: bool) -> std::result::Result<(), E> {
        Ok(())
    }
    fn visit_i64<E>(self, _: i64) -> std::result::Result<(), E> {
        Ok(())
    }
    fn visit_u64<E>(self, _: u64) -> std::result::Result<(), E> {
        Ok(())
    }
    fn visit_f64<E>(self, _: f64) -> std::result::Result<(), E> {
        Ok(())
    }
    fn visit_str<E>(self, _: &str) -> std::result::Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<(), A::Error> {
        if self.left == 0 {
            return Err(self.fail(Fault::Deep));
        }
        while seq.next_element_seed(self.below("[]"))?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<(), A::Error> {
        if self.left == 0 {
            return Err(self.fail(Fault::Deep));
        }
        let mut seen = HashSet::new();
        while let Some(key) = map.next_key::<String>()? {
            if seen.contains(&key) {
                return Err(self.fail(Fault::Duplicate(self.below(&key).path())));
            }
            map.next_value_seed(self.below(&key))?;
            seen.insert(key);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn fault(text: &str) -> String {
        match check(Path::new("f"), "manifest", text.as_bytes(), 3) {
            Ok(()) => "ok".into(),
            Err(e) => e.to_string(),
        }
    }

    #[test]
    fn keys_and_depth() {
        assert_eq!(fault(r#"{"a":{"b":[1,-2,3.5,"x",null,true]},"c":{"b":1}}"#), "ok");
        assert!(fault(r#"{"a":1,"a":1}"#).contains(r#"the key "a" occurs twice"#));
        assert!(fault(r#"{"a":{"b":1,"b":2}}"#).contains(r#"the key "a.b" occurs twice"#));
        assert!(fault("{\"a\":1,\"\\u0061\":1}").contains(r#"the key "a" occurs twice"#));
        assert!(fault("[[[1]]]").contains("ok"));
        assert!(fault("[[[[]]]]").contains("deeper than 3"));
        assert!(fault(&"[".repeat(1_000_000)).contains("deeper than 3"));
        assert!(fault("{} {}").contains("trailing"));
        assert!(fault("{\"a\":1e999}").contains("not valid JSON"));
    }
}
