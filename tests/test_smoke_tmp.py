def test_a(artifact): 
    import optc
    llm = optc.LLM(artifact)
    print(llm.generate(["Hello", "Grüße 🎉"], max_tokens=20))
    print(llm.generate([[5],[9,8,7],[100,200]], max_tokens=20))
    import subprocess; print(subprocess.run(["ls","-lR",artifact],capture_output=True,text=True).stdout)
def test_b(native_artifact):
    import optc
    llm = optc.LLM(native_artifact)
    print(llm.generate([[5],[9,8,7],[100,200]], max_tokens=20))
    import subprocess; print(subprocess.run(["ls","-lR",native_artifact],capture_output=True,text=True).stdout)
    print(subprocess.run(["unzip","-l",native_artifact/"code/native/step.pt2"],capture_output=True,text=True).stdout)
