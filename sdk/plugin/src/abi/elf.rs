//! Whether a library's file is whole. The dynamic linker maps a truncated file without complaint, and the process then
//! dies at the first page that is not there.

use std::path::Path;

/// An error that says what is wrong, if `path` is no 64-bit little-endian ELF file or ends before one of its segments
/// does. What the file means is the linker's business.
pub fn check_whole(path: &Path) -> Result<(), String> {
    let bytes = std::fs::read(path).map_err(|e| e.to_string())?;
    if !bytes.starts_with(b"\x7fELF\x02\x01") {
        return Err("it is no 64-bit ELF file".into());
    }
    let cut = || format!("the file is cut off after {} bytes", bytes.len());
    let number = |at: usize, size: usize| -> Option<u64> {
        let field = bytes.get(at..at.checked_add(size)?)?;
        Some(field.iter().rev().fold(0, |value, &byte| (value << 8) | u64::from(byte)))
    };
    // e_phoff, e_phentsize and e_phnum of the ELF header; p_offset and p_filesz of each program header.
    let table = || Some((number(32, 8)? as usize, number(54, 2)? as usize, number(56, 2)? as usize));
    let (table, size, count) = table().ok_or_else(cut)?;
    for index in 0..count {
        let end = || {
            let header = table.checked_add(index.checked_mul(size)?)?;
            number(header.checked_add(8)?, 8)?.checked_add(number(header.checked_add(32)?, 8)?)
        };
        if end().is_none_or(|end| end > bytes.len() as u64) {
            return Err(cut());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn this_very_program_is_whole_and_no_part_of_it_is() {
        let program = std::env::current_exe().unwrap();
        check_whole(&program).unwrap();
        let bytes = std::fs::read(&program).unwrap();
        let part = std::env::temp_dir().join(format!("blocklora-elf-{}", std::process::id()));
        for length in [0, 3, 40, 64, 100, bytes.len() / 2] {
            std::fs::write(&part, &bytes[..length]).unwrap();
            check_whole(&part).unwrap_err();
        }
        std::fs::remove_file(part).unwrap();
    }
}
