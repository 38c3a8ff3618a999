// Reads every file of an eStargz layer by its table of contents, and verifies each piece against it.
//
//	estargz LAYER TOC_DIGEST
//
// Prints one line for each file: its name and the digest of what was read.
package main

import (
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"sort"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"
)

func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func main() {
	file, err := os.Open(os.Args[1])
	must(err)
	stat, err := file.Stat()
	must(err)
	section := io.NewSectionReader(file, 0, stat.Size())
	reader, err := estargz.Open(section)
	must(err)
	verifier, err := reader.VerifyTOC(digest.Digest(os.Args[2]))
	must(err)
	root, ok := reader.Lookup("")
	if !ok {
		must(fmt.Errorf("no root"))
	}
	lines := []string{}
	var walk func(path string, entry *estargz.TOCEntry)
	walk = func(path string, entry *estargz.TOCEntry) {
		if entry.Type == "reg" {
			whole := sha256.New()
			content, err := reader.OpenFile(path)
			must(err)
			for at := int64(0); at < entry.Size; {
				chunk, ok := reader.ChunkEntryForOffset(path, at)
				if !ok {
					must(fmt.Errorf("%s: no chunk at %d", path, at))
				}
				data := make([]byte, chunk.ChunkSize)
				_, err := content.ReadAt(data, at)
				must(err)
				check, err := verifier.Verifier(chunk)
				must(err)
				check.Write(data)
				if !check.Verified() {
					must(fmt.Errorf("%s: chunk at %d does not match its digest", path, at))
				}
				whole.Write(data)
				at += chunk.ChunkSize
			}
			lines = append(lines, fmt.Sprintf("%s %x", path, whole.Sum(nil)))
		}
		entry.ForeachChild(func(base string, child *estargz.TOCEntry) bool {
			walk(path+"/"+base, child)
			return true
		})
	}
	walk("", root)
	sort.Strings(lines)
	for _, line := range lines {
		fmt.Println(line)
	}
}
