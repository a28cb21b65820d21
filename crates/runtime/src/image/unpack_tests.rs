use std::os::unix::fs::{FileTypeExt, MetadataExt};

use super::*;

/// A layer being written, with full control over what is wrong with it.
pub(crate) struct Layer(tar::Builder<Vec<u8>>);

impl Layer {
    pub(crate) fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    fn header(kind: tar::EntryType, path: &[u8], size: u64) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        // Straight into the field: the builder would refuse what these tests are about.
        header.as_old_mut().name[..path.len()].copy_from_slice(path);
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_mode(if kind.is_dir() { 0o755 } else { 0o644 });
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_000_000_000);
        header
    }

    fn add(mut self, mut header: tar::Header, data: &[u8]) -> Self {
        header.set_cksum();
        self.0.append(&header, data).unwrap();
        self
    }

    pub(crate) fn file(self, path: &str, data: &str) -> Self {
        let header = Self::header(tar::EntryType::Regular, path.as_bytes(), data.len() as u64);
        self.add(header, data.as_bytes())
    }

    pub(crate) fn dir(self, path: &str) -> Self {
        self.add(Self::header(tar::EntryType::Directory, path.as_bytes(), 0), b"")
    }

    fn link(self, kind: tar::EntryType, path: &str, target: &str) -> Self {
        let mut header = Self::header(kind, path.as_bytes(), 0);
        header.as_old_mut().linkname[..target.len()].copy_from_slice(target.as_bytes());
        self.add(header, b"")
    }

    pub(crate) fn symlink(self, path: &str, target: &str) -> Self {
        self.link(tar::EntryType::Symlink, path, target)
    }

    fn hard_link(self, path: &str, target: &str) -> Self {
        self.link(tar::EntryType::Link, path, target)
    }

    fn pax(self, records: &[(&str, &str)]) -> Self {
        let mut text = String::new();
        for (key, value) in records {
            let body = format!(" {key}={value}\n");
            let mut length = body.len() + 1;
            while length.to_string().len() + body.len() != length {
                length = length.to_string().len() + body.len();
            }
            text += &format!("{length}{body}");
        }
        let header = Self::header(tar::EntryType::XHeader, b"pax", text.len() as u64);
        self.add(header, text.as_bytes())
    }

    pub(crate) fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

struct Place {
    tmp: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let tmp = tempfile::tempdir().unwrap();
        std::fs::create_dir(tmp.path().join("layer")).unwrap();
        std::fs::write(tmp.path().join("secret"), "untouched").unwrap();
        Self { tmp }
    }

    fn layer(&self) -> PathBuf {
        self.tmp.path().join("layer")
    }

    fn unpack(&self, bytes: &[u8]) -> io::Result<String> {
        unpack(bytes, &self.layer(), &[], Limits { bytes: 1 << 20, entries: 50, ..Limits::default() })
    }
}

fn is_root() -> bool {
    if rustix::process::geteuid().is_root() {
        return true;
    }
    eprintln!("skipped: unpacking sets owners and makes devices, which needs root");
    false
}

#[test]
fn a_layer_is_unpacked_with_its_metadata() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let long = format!("dir/{}", "n".repeat(150));
    let layer = Layer::new()
        .dir("dir/")
        .file("dir/a", "hello")
        .hard_link("dir/b", "dir/a")
        .symlink("dir/c", "/etc/passwd")
        .pax(&[("path", &long), ("mtime", "12.5"), ("uid", "70000"), ("SCHILY.xattr.user.k", "v")])
        .file("short", "long")
        .file("./implied/x", "y")
        .bytes();
    let digest = place.unpack(&layer).unwrap();
    assert_eq!(digest, format!("sha256:{}", hex(&Sha256::digest(&layer))));
    let at = |p: &str| std::fs::symlink_metadata(place.layer().join(p)).unwrap();
    assert_eq!(at("dir/a").ino(), at("dir/b").ino());
    assert!(at("dir/c").is_symlink());
    assert_eq!((at(&long).mtime(), at(&long).mtime_nsec(), at(&long).uid()), (12, 500_000_000, 70_000));
    assert_eq!(at("dir").mtime(), 1_000_000_000);
    assert!(at("implied").is_dir());
    assert!(!place.layer().join("short").exists());
}

#[test]
fn whiteouts_become_overlayfs_ones() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let layer = Layer::new()
        .dir("opaque/")
        .file("opaque/.wh..wh..opq", "")
        .file(".wh.gone", "")
        .file("again/x", "")
        .file(".wh.again", "")
        .file(".wh.later", "")
        .dir("later/")
        .file(".wh..wh.plnk", "")
        .bytes();
    place.unpack(&layer).unwrap();
    let gone = std::fs::symlink_metadata(place.layer().join("gone")).unwrap();
    assert!(gone.file_type().is_char_device() && gone.rdev() == 0);
    for dir in ["opaque", "again", "later"] {
        let mut value = [0u8; 4];
        let n = rustix::fs::getxattr(place.layer().join(dir), c"trusted.overlay.opaque", &mut value).unwrap();
        assert_eq!(&value[..n], b"y", "{dir}");
    }
    assert!(place.layer().join("again/x").exists());
    assert_eq!(std::fs::read_dir(place.layer()).unwrap().count(), 4);
}

#[test]
fn implied_directories_are_like_those_below() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let below = place.tmp.path().join("below");
    std::fs::create_dir_all(below.join("tmp")).unwrap();
    std::os::unix::fs::chown(below.join("tmp"), Some(5), Some(6)).unwrap();
    rustix::fs::chmod(below.join("tmp"), Mode::from_raw_mode(0o1777)).unwrap();
    let layer = Layer::new().file("tmp/x", "").bytes();
    unpack(&layer[..], &place.layer(), &[below], Limits::default()).unwrap();
    let meta = std::fs::metadata(place.layer().join("tmp")).unwrap();
    assert_eq!((meta.mode() & 0o7777, meta.uid(), meta.gid()), (0o1777, 5, 6));
}

#[track_caller]
fn refuses(layer: Layer, want: &str) {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let error = place.unpack(&layer.bytes()).expect_err("it should be refused").to_string();
    assert!(error.contains(want), "{error}");
    assert_eq!(std::fs::read_to_string(place.tmp.path().join("secret")).unwrap(), "untouched");
    assert_eq!(std::fs::read_dir(place.tmp.path()).unwrap().count(), 2, "something was made outside");
}

#[test]
fn hostile_layers_are_refused() {
    refuses(Layer::new().file("../secret", "x"), "leads out of the layer");
    refuses(Layer::new().file("a/../../secret", "x"), "leads out of the layer");
    refuses(Layer::new().symlink("l", "l").file("l/x", "x"), "too many links");
    refuses(Layer::new().symlink("a", "b").symlink("b", "a/x").file("a/x", "x"), "too many links");
    refuses(Layer::new().file("f", "").file("f/x", "x"), "Not a directory");
    refuses(Layer::new().hard_link("h", "../secret"), "leads out of the layer");
    refuses(Layer::new().symlink("l", "..").hard_link("h", "l/secret"), "No such file");
    refuses(Layer::new().hard_link("h", "nothing"), "No such file");
    refuses(Layer::new().dir("d/").hard_link("h", "d"), "a hard link to a directory");
    refuses(Layer::new().file(".wh...", ""), "a whiteout without a name");
    refuses(Layer::new().pax(&[("path", "../secret")]).file("x", "y"), "leads out of the layer");
    refuses(Layer::new().pax(&[("path", &"d/".repeat(300))]).file("x", "y"), "is too deep");
    refuses(Layer::new().pax(&[("GNU.sparse.major", "1")]).file("x", "y"), "a sparse file");
    refuses((0..60).fold(Layer::new(), |l, n| l.file(&format!("f{n}"), "")), "too many entries");
}

/// Links on the way count as they would in the container: whatever they say, they end inside.
#[test]
fn links_lead_nowhere_but_inside() {
    if !is_root() {
        return;
    }
    let check = |layer: Layer, want: &str| {
        let place = Place::new();
        place.unpack(&layer.bytes()).unwrap();
        let there = std::fs::symlink_metadata(place.layer().join(want));
        assert!(there.is_ok(), "{want} is not there");
        assert_eq!(std::fs::read_to_string(place.tmp.path().join("secret")).unwrap(), "untouched");
        assert_eq!(std::fs::read_dir(place.tmp.path()).unwrap().count(), 2, "something was made outside");
    };
    check(Layer::new().symlink("l", "..").file("l/secret", "x"), "secret");
    check(Layer::new().symlink("l", "../../../..").dir("l/d/"), "d");
    check(Layer::new().symlink("l", "/nowhere/at/all").file("l/x", "x"), "nowhere/at/all/x");
    check(Layer::new().symlink("l", "..").file("l/.wh.secret", ""), "secret");
    check(
        Layer::new().dir("usr/").symlink("lib", "usr/lib").file("lib/a", "1").file("lib/b", "2"),
        "usr/lib/b",
    );
    check(Layer::new().file("a/f", "").symlink("a/l", "../b").file("a/l/x", ""), "b/x");
    // A link of a layer below: what is put "into" it lands where the container will look.
    let place = Place::new();
    let below = place.tmp.path().join("layer-below");
    std::fs::create_dir_all(below.join("usr/lib")).unwrap();
    std::os::unix::fs::symlink("usr/lib", below.join("lib")).unwrap();
    unpack(&Layer::new().file("lib/x", "1").bytes()[..], &place.layer(), &[below], Limits::default())
        .unwrap();
    assert!(place.layer().join("usr/lib/x").exists() && !place.layer().join("lib").exists());
}

#[test]
fn absolute_paths_stay_inside() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    place.unpack(&Layer::new().file("/etc/x", "in").bytes()).unwrap();
    assert_eq!(std::fs::read_to_string(place.layer().join("etc/x")).unwrap(), "in");
    // A link that points outside may be there; writing over it replaces the link.
    let layer = Layer::new().symlink("l", "../secret").file("l", "mine").bytes();
    let place = Place::new();
    place.unpack(&layer).unwrap();
    assert_eq!(std::fs::read_to_string(place.layer().join("l")).unwrap(), "mine");
    assert_eq!(std::fs::read_to_string(place.tmp.path().join("secret")).unwrap(), "untouched");
}

#[test]
fn sizes_that_lie_are_noticed() {
    if !is_root() {
        return;
    }
    // Announces more than there is.
    let mut header = Layer::header(tar::EntryType::Regular, b"f", 5000);
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(&[7; 512]);
    let error = Place::new().unpack(&bytes).unwrap_err().to_string();
    assert!(error.contains("5000 bytes announced, 512 there"), "{error}");
    // An extended header of a terabyte is refused before a byte of it is kept.
    let mut header = Layer::header(tar::EntryType::XHeader, b"pax", 1 << 40);
    header.set_cksum();
    let error = Place::new().unpack(header.as_bytes()).unwrap_err().to_string();
    assert!(error.contains("an extended header of 1099511627776 bytes"), "{error}");
    // A small file that unfolds into a large one.
    let mut bomb = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    bomb.write_all(&vec![0; 4 << 20]).unwrap();
    let error = Place::new().unpack(&bomb.finish().unwrap()).unwrap_err().to_string();
    assert!(error.contains("larger than the limit"), "{error}");
}

#[test]
fn every_compression_gives_the_same_layer() {
    if !is_root() {
        return;
    }
    let plain = Layer::new().file("a", &"text ".repeat(100)).bytes();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gzip.write_all(&plain).unwrap();
    let zstd = zstd::stream::encode_all(&plain[..], 3).unwrap();
    let want = Place::new().unpack(&plain).unwrap();
    for compressed in [gzip.finish().unwrap(), zstd] {
        assert_eq!(Place::new().unpack(&compressed).unwrap(), want);
    }
}
