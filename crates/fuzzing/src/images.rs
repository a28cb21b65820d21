//! Layers and archives of images.

use std::cell::RefCell;
use std::fs;
use std::io::Cursor;
use std::path::Path;

use minke_runtime::{ImageService, ImageStore, Limits, RegistryConfig, unpack_layer};
use sha2::{Digest, Sha256};

const BLOCK: usize = 512;

/// Where targets work; each input leaves it empty.
fn with_dir(work: impl FnOnce(&Path)) {
    thread_local!(static DIR: RefCell<tempfile::TempDir> =
        RefCell::new(tempfile::tempdir().expect("a directory can be made")));
    DIR.with_borrow(|dir| {
        let inner = dir.path().join("work");
        fs::create_dir(&inner).expect("it is not there");
        work(&inner);
        let beside: Vec<_> = fs::read_dir(dir.path()).expect("read").flatten().map(|e| e.path()).collect();
        assert_eq!(beside, [inner.as_path()], "something was made outside");
        fs::remove_dir_all(&inner).expect("removed");
    });
}

/// Makes the checksums of an archive's headers right, so that other damage is looked at.
fn with_checksums(mut tar: Vec<u8>) -> Vec<u8> {
    let mut at = 0_usize;
    while let Some(block) = tar.get_mut(at..at.saturating_add(BLOCK)) {
        let header = tar::Header::from_byte_slice(block);
        let size = header.entry_size().unwrap_or(0);
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        if sum != 8 * u32::from(b' ') {
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        } else {
            block[148..156].fill(0);
        }
        let blocks = usize::try_from(size).unwrap_or(usize::MAX).div_ceil(BLOCK);
        at = at.saturating_add(BLOCK).saturating_add(blocks.saturating_mul(BLOCK));
    }
    tar
}

/// One layer, plain or compressed, with its checksums put right or not.
pub fn layer(data: &[u8]) {
    let Some((fix, data)) = data.split_first() else { return };
    let data = if fix & 1 == 1 { with_checksums(data.to_vec()) } else { data.to_vec() };
    with_dir(|dir| {
        fs::create_dir(dir.join("layer")).expect("made");
        fs::write(dir.join("secret"), "untouched").expect("written");
        let limits = Limits { bytes: 1 << 20, entries: 100, ..Limits::default() };
        let unpacked = unpack_layer(&data[..], &dir.join("layer"), &[], limits);
        if let (Ok(digest), false) = (&unpacked, data.starts_with(&[0x1f, 0x8b]) || data.starts_with(&[0x28]))
        {
            assert_eq!(*digest, digest_of(&data));
        }
        assert_eq!(fs::read_to_string(dir.join("secret")).expect("it is there"), "untouched");
        assert_eq!(fs::read_dir(dir).expect("read").count(), 2, "something was made outside");
    });
}

fn digest_of(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
    format!("sha256:{hex}")
}

/// An archive made of texts divided by zero bytes. The first is `manifest.json`, or with an `O` before it
/// `index.json` of an OCI layout; the others are blobs, in which `$n` is the digest of the n-th one. `@` stands
/// for a good layer. Whatever is in it, what is not taken leaves nothing.
pub fn archive(data: &[u8]) {
    let Some((&kind, rest)) = data.split_first() else { return };
    if kind == b'T' {
        return load(with_checksums(rest.to_vec()));
    }
    let mut texts: Vec<Vec<u8>> = rest.split(|byte| *byte == 0).take(9).map(<[u8]>::to_vec).collect();
    for at in (0..texts.len()).rev() {
        if texts[at] == b"@" {
            texts[at] = good_layer();
        }
        let digest = digest_of(&texts[at]);
        for earlier in &mut texts[..at] {
            if let Ok(text) = std::str::from_utf8(earlier) {
                *earlier = text
                    .replace(&format!("${at}"), &digest)
                    .replace(&format!("%{at}"), &digest[7..])
                    .into_bytes();
            }
        }
    }
    let mut tar = tar::Builder::new(Vec::new());
    let mut add = |name: String, bytes: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, bytes).expect("memory can be written");
    };
    if kind == b'O' {
        add("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#);
        add("index.json".to_owned(), &texts[0]);
    } else {
        add("manifest.json".to_owned(), &texts[0]);
    }
    for text in &texts[1..] {
        add(format!("blobs/sha256/{}", &digest_of(text)[7..]), text);
    }
    load(tar.into_inner().expect("memory can be written"));
}

fn good_layer() -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(1);
    header.set_mode(0o644);
    tar.append_data(&mut header, "a", &b"1"[..]).expect("memory can be written");
    tar.into_inner().expect("memory can be written")
}

fn load(archive: Vec<u8>) {
    with_dir(|dir| {
        let store = ImageStore::open(dir, RegistryConfig::default()).expect("it is a new one");
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime can be made");
        runtime.block_on(async {
            let loaded = store.load(Cursor::new(archive), None, None).await;
            let images = store.list().await.expect("the index is good");
            assert_eq!(loaded.is_ok(), !images.is_empty(), "{loaded:?}");
            for name in loaded.unwrap_or_default() {
                assert!(store.resolve(&name).await.expect("it is a name").is_some(), "{name}");
            }
            for image in images {
                store.prepare(&image.id).expect("an image that is listed is whole");
                store.remove(&image.id).await.expect("it is there");
            }
            let archive = Cursor::new(Vec::new());
            let _ = store.load(archive, None, None).await;
        });
        drop(store);
        // Opening collects what a load that failed has left.
        ImageStore::open(dir, RegistryConfig::default()).expect("it is a good one");
        for left in ["images/blobs/sha256", "snapshots"] {
            assert_eq!(fs::read_dir(dir.join(left)).expect("read").count(), 0, "{left} is not empty");
        }
    });
}

/// A Dockerfile, and as a `.dockerignore`.
pub fn dockerfile(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        minke_cluster::build::fuzz(text);
    }
}
